// A request and what is planned for it: the fields of core/request.py that decide anything.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "index.h"

namespace headway {

constexpr int32_t ROOT = -1;  // parent of a first block

enum class State : int32_t { waiting, running, preempted, finished, rejected, aborted };
enum class Reason : int32_t { none, stop, length };

// Positions as disjoint spans [first, last): core/spans.py.
using Spans = std::vector<std::pair<int64_t, int64_t>>;

inline int64_t overlap(const Spans& spans, int64_t start, int64_t end) {
    int64_t total = 0;
    for (auto& [first, last] : spans) total += std::max<int64_t>(0, std::min(end, last) - std::max(start, first));
    return total;
}

inline void unite(Spans& spans, int64_t start, int64_t end) {
    if (start >= end) return;
    Spans apart;
    for (auto& [first, last] : spans) {
        if (last < start || end < first) {
            apart.push_back({first, last});
        } else {
            start = std::min(start, first), end = std::max(end, last);
        }
    }
    apart.push_back({start, end});
    spans = apart;
}

// The token at position p is low + (base + p * stride) mod size: plugins/executors/sim.py.
struct Stream {
    int64_t low, size, base, stride;
    int64_t token(int64_t position) const { return low + int64_t((uint64_t(base) + uint64_t(position) * uint64_t(stride)) % uint64_t(size)); }
};

// What a waiting request found in the cache the last time, and what that rested on: core/matching.py.
struct Match {
    std::vector<int32_t> blocks;
    std::vector<uint32_t> generations;
    uint64_t version = 0;
    int64_t limit = -1;  // -1: nobody has asked
};

struct Request {
    int64_t index;
    double arrival_time;
    int64_t num_prompt_tokens;
    int64_t max_num_tokens;
    int64_t hidden_end;  // known tokens at which an emulated answer ends
    Stream stream;
    std::vector<int64_t> stop_tokens;  // that the stream can bring
    int64_t root_key;                  // of its salt
    int32_t salt;                      // below zero: what first blocks of this salt hang under
    bool refused;
    bool reported = false;  // its end

    State state = State::waiting;
    Reason reason = Reason::none;
    int64_t num_known = 0;   // prompt, and generated tokens that have come back
    int64_t num_tokens = 0;  // known ones, and placeholders
    int64_t num_computed = 0;
    int64_t num_scheduled = 0;
    int64_t planned_step = -1;
    int64_t num_steps_in_flight = 0;
    bool releasing = false;  // left `running`, with blocks in steps in flight
    int64_t reserved = 0;    // blocks that come back for it
    std::vector<int32_t> block_table;
    int64_t num_published = 0;
    int32_t published_parent = ROOT;
    std::vector<int32_t> twins;  // of published duplicates, referenced, in the order of the table
    Spans planned_before;
    int64_t planned_from = 0;
    Match match;

    std::vector<int32_t> tokens;  // prompt and answer with a prefix cache, the answer alone without
    std::vector<int64_t> keys;    // of full blocks, as far as somebody asked
    std::vector<double> token_times;
    int64_t num_cached_tokens = 0, num_preemptions = 0, num_recomputed_tokens = 0;
    double first_scheduled_time = -1.0, finish_time = -1.0;

    int64_t num_new() const { return num_tokens - num_computed - num_scheduled; }

    // The key of full block `i`, whose tokens are known.
    int64_t key(int64_t i, int64_t block_size) {
        while (int64_t(keys.size()) <= i) {
            int64_t above = keys.empty() ? root_key : keys.back();
            keys.push_back(chain_key(above, &tokens[keys.size() * block_size], block_size));
        }
        return keys[i];
    }
};

// Requests in the order of arrival, which is that of their indices.
inline bool earlier(const Request* a, const Request* b) { return a->index < b->index; }

// What a step runs: core/plan.py.
struct Plan {
    int64_t step = 0, num_tokens = 0, num_evicted = 0;
    double now = 0, start = 0, end = 0;
    std::vector<Request*> requests;
    std::vector<int64_t> starts, lengths;
    std::vector<bool> samples;
    std::vector<int64_t> allocated;  // per allocation: the request, the first place in its table, the blocks
    std::vector<int64_t> sizes;      // blocks of each allocation
    std::vector<int64_t> preempted;  // by index

    void begin(int64_t number, double time) {
        step = number, now = time, num_tokens = num_evicted = 0;
        requests.clear(), starts.clear(), lengths.clear(), samples.clear();
        allocated.clear(), sizes.clear(), preempted.clear();
    }
    void allocate(const Request& request, int64_t first, const int32_t* blocks, int64_t count) {
        allocated.push_back(request.index);
        allocated.push_back(first);
        allocated.insert(allocated.end(), blocks, blocks + count);
        sizes.push_back(count);
    }
};

}  // namespace headway
