// All that a scheduler can do in a step: core/step.py, with victim=newest (the running request that arrived last goes first).
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "pool.h"
#include "request.h"
#include "roster.h"

namespace headway {

// What `add` answers. `stop` ends a walk over those that wait: no budget is left, or blocks are missing.
enum class Grant { granted, stop, not_ready };

class Step {
   public:
    static constexpr int64_t ALL = std::numeric_limits<int64_t>::max();

    Step(Roster& roster, Pool& pool) : roster(roster), pool(pool) {}

    Roster& roster;
    Pool& pool;
    Plan* plan = nullptr;
    int64_t tokens_left = 0, seqs_left = 0;
    std::vector<Request*> running;  // as the step began
    std::vector<Request*> waiting;  // the first of them, as the step began

    void begin(Plan& empty, int64_t tokens, int64_t seqs) {
        plan = &empty;
        tokens_left = tokens;
        seqs_left = seqs;
        running = roster.running;
        waiting.assign(roster.waiting.begin(), roster.waiting.begin() + std::min<int64_t>(WINDOW, int64_t(roster.waiting.size())));
    }

    // Whether nobody may start in this step any more: what `add` answers every waiting request.
    bool closed() const {
        bool thrashing = roster.thrashing() && !roster.running.empty();
        return thrashing || int64_t(roster.running.size()) >= roster.max_num_seqs || tokens_left <= 0 || seqs_left <= 0;
    }

    // Whether blocks for all known tokens of a waiting request are available, and `spare` more.
    bool fits(Request& request, int64_t spare) {
        auto [need, available] = supply(roster.match(request), request.num_tokens);
        return need + spare <= available;
    }

    // The request's next token, or its next chunk of at most `at_most`.
    Grant add(Request& request, int64_t at_most = ALL) {
        if (decode(request)) return Grant::granted;
        return request.state == State::running ? add_running(request, at_most) : add_waiting(request, at_most);
    }

   private:
    static constexpr int64_t WINDOW = 256;  // waiting requests that a step looks at: Scheduler.window

    // The common case: the next token of a running request that has room for it in its last block.
    bool decode(Request& request) {
        if (tokens_left <= 0 || seqs_left <= 0) return false;
        int64_t start = request.num_computed + request.num_scheduled;
        if (request.num_tokens - start != 1 || request.state != State::running || request.planned_step == plan->step) return false;
        if (request.num_tokens >= request.max_num_tokens || start >= int64_t(request.block_table.size()) * pool.block_size) return false;
        if (request.num_scheduled && !roster.placeholders) return false;
        request.planned_step = plan->step;
        request.num_scheduled++;
        request.num_tokens++;
        request.num_steps_in_flight++;
        note(request, start, 1, true);
        return true;
    }

    Grant add_running(Request& request, int64_t at_most) {
        if (request.num_tokens >= request.max_num_tokens) return Grant::not_ready;  // its last token is being sampled
        int64_t fresh = request.num_new();
        if (fresh <= 0 || (!roster.placeholders && request.num_known < request.num_tokens)) return Grant::not_ready;
        int64_t n = grantable(fresh, at_most);
        if (n <= 0) return Grant::stop;
        int64_t start = request.num_computed + request.num_scheduled;
        int64_t need = pool.blocks_for(start + n) - int64_t(request.block_table.size());
        if (need > pool.num_available() && !make_room(request, need)) {
            if (request.state == State::running) roster.reserve(request, need);  // what it waits for is not for those who want to start
            return Grant::stop;
        }
        append(request, start, n, need);
        return Grant::granted;
    }

    Grant add_waiting(Request& request, int64_t at_most) {
        if (request.planned_step == plan->step || request.num_steps_in_flight || closed()) return Grant::stop;
        const Match& match = roster.match(request);
        int64_t cached = int64_t(match.blocks.size()) * pool.block_size;
        int64_t n = grantable(request.num_tokens - cached, at_most);
        if (n <= 0) return Grant::stop;
        auto [need, available] = supply(match, cached + n);
        if (need > available) return Grant::stop;
        roster.admit(request, match, plan->now);
        auto& table = request.block_table;
        if (!table.empty()) plan->allocate(request, 0, table.data(), int64_t(table.size()));
        append(request, cached, n, need);
        return Grant::granted;
    }

    // (blocks that a waiting request lacks to hold so many tokens, blocks that it may have)
    std::pair<int64_t, int64_t> supply(const Match& match, int64_t num_tokens) const {
        int64_t idle = 0;  // evictable now, but not for this request
        for (int32_t block : match.blocks) idle += !pool.blocks[block].ref_count;
        int64_t need = pool.blocks_for(num_tokens) - int64_t(match.blocks.size());
        return {need, pool.num_available() - idle - roster.num_reserved};
    }

    int64_t grantable(int64_t fresh, int64_t at_most) const { return seqs_left > 0 ? std::min({tokens_left, fresh, at_most}) : 0; }

    void append(Request& request, int64_t start, int64_t n, int64_t need) {
        if (need > 0) {
            auto& table = request.block_table;
            int64_t first = int64_t(table.size());
            for (int64_t i = 0; i < need; i++) table.push_back(pool.allocate());
            plan->allocate(request, first, &table[first], need);
            roster.reserve(request, 0);
        }
        note(request, start, n, roster.schedule(request, plan->step, start, n));
    }

    void note(Request& request, int64_t start, int64_t n, bool sample) {
        tokens_left -= n;
        seqs_left--;
        plan->requests.push_back(&request);
        plan->starts.push_back(start);
        plan->lengths.push_back(n);
        plan->samples.push_back(sample);
        plan->num_tokens += n;
    }

    // Preempts until `need` blocks are available. False: they come back with a step in flight, or the request had to yield itself.
    bool make_room(Request& request, int64_t need) {
        auto candidate = running.rbegin();
        while (need > pool.num_available()) {
            if (need <= pool.num_available() + roster.num_releasing_blocks()) return false;
            if (candidate == running.rend() || *candidate == &request) {
                preempt(request);
                return false;
            }
            Request& other = **candidate++;
            if (other.planned_step != plan->step) preempt(other);
        }
        return true;
    }

    void preempt(Request& request) {
        plan->preempted.push_back(request.index);
        roster.preempt(request, plan->step);
    }
};

}  // namespace headway
