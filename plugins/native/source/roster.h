// Which requests wait and run, and every way from one to the other: core/roster.py.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "pool.h"
#include "request.h"

namespace headway {

template <class Requests>
void join(Requests& requests, Request* request) {
    requests.insert(std::upper_bound(requests.begin(), requests.end(), request, earlier), request);
}

template <class Requests>
void leave(Requests& requests, Request* request) {
    requests.erase(std::lower_bound(requests.begin(), requests.end(), request, earlier));
}

class Roster {
   public:
    Roster(Pool& pool, int64_t max_num_seqs, int64_t most_preemptions, bool placeholders)
        : max_num_seqs(max_num_seqs), most_preemptions(most_preemptions), placeholders(placeholders), pool_(pool) {}

    const int64_t max_num_seqs, most_preemptions;
    const bool placeholders;
    std::vector<Request*> running;
    std::deque<Request*> waiting;
    std::vector<Request*> releasing;
    std::vector<Request*> ended;  // since they were last taken
    int64_t num_reserved = 0;     // blocks that come back for running requests
    int64_t num_preemptions = 0;

    bool thrashing() const { return preemptions_since_token_ > most_preemptions; }

    void admit(Request& request, const Match& match, double now) {
        int64_t cached = int64_t(match.blocks.size()) * pool_.block_size;
        for (int32_t block : match.blocks) pool_.acquire(block, true);
        take(request, match.blocks);
        request.planned_from = cached;
        if (request.state == State::waiting) {
            request.num_cached_tokens = cached;
            request.first_scheduled_time = now;
        }
        request.match.limit = -1;
        leave(waiting, &request);
        join(running, &request);
        request.state = State::running;
    }

    // Plans `n` tokens from `start` on, in a table that has grown already. Returns whether one is sampled.
    bool schedule(Request& request, int64_t step, int64_t start, int64_t n) {
        if (!request.planned_before.empty()) request.num_recomputed_tokens += overlap(request.planned_before, start, start + n);
        bool sample = start + n == request.num_tokens;
        request.planned_step = step;
        request.num_scheduled += n;
        request.num_steps_in_flight++;
        if (sample) request.num_tokens++;  // a placeholder until the step comes back
        return sample;
    }

    void reserve(Request& request, int64_t blocks) {
        num_reserved += blocks - request.reserved;
        request.reserved = blocks;
    }

    void preempt(Request& request, int64_t step) {
        request.planned_step = step;
        request.state = State::preempted;
        reserve(request, 0);
        request.num_preemptions++;
        unite(request.planned_before, request.planned_from, request.num_computed + request.num_scheduled);
        num_preemptions++;
        preemptions_since_token_++;
        leave(running, &request);
        join(waiting, &request);
        give_back(request);
    }

    // A step has come back. Returns how many tokens reached requests; who has ended is in `over`, with the reason.
    int64_t commit(const Plan& plan, double now, std::vector<Request*>& over) {
        int64_t emitted = 0;
        for (size_t i = 0; i < plan.requests.size(); i++) {
            Request& request = *plan.requests[i];
            request.num_scheduled -= plan.lengths[i];
            request.num_steps_in_flight--;
            if (request.state == State::running) {
                request.num_computed = plan.starts[i] + plan.lengths[i];
                if (pool_.caches) publish(request, request.num_computed / pool_.block_size);
            } else {
                if (!request.num_steps_in_flight && request.releasing) {
                    request.releasing = false;
                    releasing.erase(std::find(releasing.begin(), releasing.end(), &request));
                    release(request);
                }
                if (request.state != State::preempted) continue;  // it ended while this step was in flight
            }
            if (!plan.samples[i]) continue;
            emitted++;
            int64_t token = request.stream.token(plan.starts[i] + plan.lengths[i]);
            request.tokens.push_back(int32_t(token));
            request.token_times.push_back(now);
            request.num_known++;
            request.reason = ending(request, token);
            if (request.reason != Reason::none) over.push_back(&request);
        }
        if (emitted) preemptions_since_token_ = 0;
        return emitted;
    }

    // It leaves the list that it is on: finished, or aborted between two steps.
    void finish(Request& request, State state, double now) {
        if (request.state == State::running) {
            leave(running, &request);
        } else {
            leave(waiting, &request);
        }
        end(request, state, now);
        reserve(request, 0);
        give_back(request);
    }

    void end(Request& request, State state, double now) {
        request.state = state;
        request.finish_time = now;
        request.num_tokens = request.num_known;
        ended.push_back(&request);
    }

    // Blocks that come free when the steps in flight have come back.
    int64_t num_releasing_blocks() const {
        int64_t count = 0;
        for (Request* request : releasing)
            for (int32_t block : request->block_table) count += pool_.blocks[block].ref_count == 1;
        return count;
    }

    // Cached prefix of a request that waits and holds no block. Asks again only where the cache changed around the last answer.
    const Match& match(Request& request) {
        Match& match = request.match;
        if (!pool_.caches) return match;
        int64_t limit = (request.num_tokens - 1) / pool_.block_size;  // the last token is always computed
        bool asked = match.limit >= 0;
        size_t known = asked ? match.blocks.size() : 0;
        while (known && pool_.blocks[match.blocks[known - 1]].generation != match.generations[known - 1]) known--;
        if (asked && known == match.blocks.size() && match.version == version(match) && match.limit == limit) return match;
        match.blocks.resize(known);
        match.generations.resize(known);
        while (int64_t(match.blocks.size()) < limit) {
            int64_t place = int64_t(match.blocks.size());
            int32_t parent = place ? match.blocks.back() : request.salt;
            int32_t block = pool_.index.find(request.key(place, pool_.block_size), parent, &request.tokens[place * pool_.block_size]);
            if (block == KeyTable::NONE) break;
            match.blocks.push_back(block);
            match.generations.push_back(pool_.blocks[block].generation);
        }
        match.version = version(match);
        match.limit = limit;
        return match;
    }

   private:
    uint64_t version(const Match& match) const { return match.blocks.empty() ? pool_.root_version : pool_.blocks[match.blocks.back()].version; }

    void take(Request& request, const std::vector<int32_t>& cached) {
        request.block_table = cached;
        request.num_published = int64_t(cached.size());
        request.published_parent = cached.empty() ? ROOT : cached.back();
        request.num_computed = request.num_published * pool_.block_size;
    }

    void publish(Request& request, int64_t upto) {
        for (; request.num_published < upto; request.num_published++) {
            int32_t canonical = pool_.publish(request, request.num_published);
            if (canonical != request.block_table[request.num_published]) request.twins.push_back(canonical);
            request.published_parent = canonical;
        }
    }

    static Reason ending(const Request& request, int64_t token) {
        auto& stops = request.stop_tokens;
        if (!stops.empty() && std::find(stops.begin(), stops.end(), token) != stops.end()) return Reason::stop;
        if (request.num_known >= request.hidden_end) return Reason::stop;
        return request.num_known >= request.max_num_tokens ? Reason::length : Reason::none;
    }

    // Now, or when the last step in flight that uses the blocks has come back.
    void give_back(Request& request) {
        if (!request.num_steps_in_flight) {
            release(request);
        } else if (!request.releasing) {
            request.releasing = true;
            releasing.push_back(&request);
        }
    }

    void release(Request& request) {
        pool_.release(request.twins);
        pool_.release(request.block_table);
        request.twins.clear();
        take(request, {});
        request.match.limit = -1;
    }

    Pool& pool_;
    int64_t preemptions_since_token_ = 0;
};

}  // namespace headway
