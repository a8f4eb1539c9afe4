// What a run leaves behind: the decision hash (core/decisions.py) and the steps as columns (core/step_log.py).
#pragma once
#include <cstdint>
#include <vector>

#include "blake2b.h"
#include "request.h"

namespace headway {

class DecisionLog {
   public:
    void record(const Plan& plan, const std::vector<int64_t>& evicted) {
        words_ = {plan.step, int64_t(plan.requests.size()), int64_t(plan.sizes.size()), int64_t(plan.preempted.size()), int64_t(evicted.size()), 0};
        for (auto* request : plan.requests) words_.push_back(request->index);
        for (auto* list : {&plan.starts, &plan.lengths, &plan.allocated, &plan.preempted, &evicted})
            words_.insert(words_.end(), list->begin(), list->end());
        hash_.update(words_.data(), words_.size() * sizeof(int64_t));
    }
    void digest(uint8_t* out) const { hash_.digest(out); }

   private:
    Blake2b hash_;
    std::vector<int64_t> words_;
};

// Rows of `counts`: COUNTS and then the extents of core/step_log.py; of `times`: start, end and time of planning.
struct StepLog {
    static constexpr int COUNTS = 12, TIMES = 3;
    std::vector<int64_t> counts, requests, chunks, preempted, allocations, sizes;
    std::vector<double> times;

    int64_t num_steps() const { return int64_t(counts.size()) / COUNTS; }
    int64_t num_numbers() const { return int64_t(requests.size() + allocations.size()); }

    void add(const Plan& plan, double now, const int64_t (&state)[5]) {
        auto& [emitted, num_running, num_waiting, kv_used, kv_cached] = state;
        for (auto* request : plan.requests) requests.push_back(request->index);
        chunks.insert(chunks.end(), plan.starts.begin(), plan.starts.end());
        chunks.insert(chunks.end(), plan.lengths.begin(), plan.lengths.end());
        preempted.insert(preempted.end(), plan.preempted.begin(), plan.preempted.end());
        allocations.insert(allocations.end(), plan.allocated.begin(), plan.allocated.end());
        sizes.insert(sizes.end(), plan.sizes.begin(), plan.sizes.end());
        const int64_t row[COUNTS] = {
            plan.step, emitted, num_running, num_waiting, kv_used, kv_cached, int64_t(plan.preempted.size()), plan.num_evicted,
            int64_t(plan.requests.size()), plan.num_tokens, int64_t(plan.sizes.size()), int64_t(plan.allocated.size())};
        counts.insert(counts.end(), row, row + COUNTS);
        const double seconds[TIMES] = {plan.start, now, plan.now};
        times.insert(times.end(), seconds, seconds + TIMES);
    }
    void clear() {
        for (auto* column : {&counts, &requests, &chunks, &preempted, &allocations, &sizes}) column->clear();
        times.clear();
    }
};

}  // namespace headway
