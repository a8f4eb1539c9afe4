// scheduler=chunked and scheduler=prefill_first (fcfs), with order=fcfs: plugins/schedulers/.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "step.h"

namespace headway {

class Scheduler {
   public:
    virtual ~Scheduler() = default;
    virtual void plan(Step& step) = 0;
};

class ChunkedPrefill final : public Scheduler {
   public:
    ChunkedPrefill(int64_t token_budget, int64_t chunk_size, bool whole_prompts)
        : token_budget_(token_budget), chunk_size_(chunk_size), whole_prompts_(whole_prompts) {}

    void plan(Step& step) override {
        step.tokens_left = std::min(step.tokens_left, token_budget_);
        prefills_.clear();
        for (Request* request : step.running) {
            if (request->num_new() > 1) {
                prefills_.push_back(request);
            } else {
                step.add(*request);
            }
        }
        for (Request* request : prefills_) step.add(*request, chunk_size_);
        int64_t promised = 0;
        for (Request* request : prefills_) promised += lacks(step, *request);
        for (Request* request : step.waiting) {
            if (step.closed() || request->num_steps_in_flight) break;
            if (whole_prompts_ && !step.fits(*request, promised)) break;
            if (step.add(*request, chunk_size_) == Grant::stop) break;
            promised += lacks(step, *request);
        }
    }

   private:
    // Blocks that a prompt, or what is recomputed, needs beside those that its request has.
    int64_t lacks(const Step& step, const Request& request) const {
        if (!whole_prompts_ || request.block_table.empty() || request.num_new() <= 1) return 0;
        return std::max<int64_t>(0, step.pool.blocks_for(request.num_tokens) - int64_t(request.block_table.size()));
    }

    int64_t token_budget_, chunk_size_;
    bool whole_prompts_;  // admit_on=prompt
    std::vector<Request*> prefills_;
};

class PrefillFirst final : public Scheduler {
   public:
    // `watermark`: blocks that a prompt must leave free when it starts beside others.
    explicit PrefillFirst(int64_t watermark) : watermark_(watermark) {}

    void plan(Step& step) override {
        prefills_.clear();
        for (Request* request : step.running)
            if (request->num_new() > 1) prefills_.push_back(request);
        for (Request* request : prefills_) step.add(*request);
        for (Request* request : step.waiting) {
            if (step.closed() || request->num_steps_in_flight) break;
            int64_t rest = request->num_tokens - int64_t(step.roster.match(*request).blocks.size()) * step.pool.block_size;
            if (!step.plan->requests.empty() && rest > step.tokens_left) break;
            int64_t spare = step.roster.running.empty() ? 0 : watermark_;
            if (!step.fits(*request, spare) || step.add(*request) == Grant::stop) break;
        }
        if (step.plan->requests.empty())
            for (Request* request : step.running) step.add(*request);
    }

   private:
    int64_t watermark_;
    std::vector<Request*> prefills_;
};

}  // namespace headway
