// The loop: arrivals -> plan -> launch ..(max_inflight - 1 steps later).. collect -> commit: core/engine.py, every step of it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "log.h"
#include "roofline.h"
#include "roster.h"
#include "schedulers.h"
#include "step.h"

namespace headway {

struct Limits {
    int64_t max_num_seqs, most_preemptions, max_num_batched_tokens, max_inflight, num_blocks, block_size;
    bool placeholders, caches, logs;
    int64_t pause_steps, pause_numbers;  // `run` comes back after so many steps, or planned requests and allocated blocks
};

// Why `run` came back.
enum class Pause : int32_t { finished, wants_arrival, paused, stuck };

class Engine {
   public:
    Engine(const Limits& limits, std::unique_ptr<Scheduler> scheduler, const Device& device)
        : pool(limits.num_blocks, limits.block_size, limits.caches),
          roster(pool, limits.max_num_seqs, limits.most_preemptions, limits.placeholders),
          limits_(limits), scheduler_(std::move(scheduler)), device_(device), step_(roster, pool), plans_(limits.max_inflight + 1) {}

    Pool pool;
    Roster roster;
    DecisionLog decisions;
    StepLog log;
    std::vector<double> readings;  // of the clock, since they were last taken
    double now = 0.0, busy_time = 0.0;
    int64_t num_steps = 0, planned_tokens = 0, kv_peak = 0;

    void arrive(std::unique_ptr<Request> request) { next_ = std::move(request); }
    void arrivals_end() { more_ = false; }

    Pause run() {
        Pause pause = Pause::paused;
        while (turns_ < limits_.pause_steps && pause == Pause::paused && !log_is_full()) {
            pause = turn();
            turns_++;
        }
        if (pause == Pause::paused) turns_ = 0;
        return pause;
    }

    // Ends a request before the next turn; tokens of its steps in flight are dropped. False: it is still to arrive.
    bool abort(int64_t index) {
        if (index >= int64_t(requests_.size())) return false;
        Request* request = requests_[index].get();
        if (request && request->state < State::finished) roster.finish(*request, State::aborted, now);
        return true;
    }

    // Whoever is left ends; nothing may follow.
    void abort_all() {
        for (Request* request : roster.running) roster.end(*request, State::aborted, now);
        for (Request* request : roster.waiting) roster.end(*request, State::aborted, now);
    }

    // Those that ended were reported. One in a step in flight is still needed there.
    void forget_ended() {
        for (Request* request : roster.ended) {
            request->reported = true;
            if (!request->num_steps_in_flight) requests_[request->index].reset();
        }
        roster.ended.clear();
    }

   private:
    bool log_is_full() const { return log.num_steps() >= limits_.pause_steps || log.num_numbers() >= limits_.pause_numbers; }

    // One turn of the loop; `paused` when another one follows.
    Pause turn() {
        if (!ingesting_) read_clock();
        ingesting_ = true;
        if (!ingest()) return Pause::wants_arrival;
        ingesting_ = false;
        if (num_flights_ < limits_.max_inflight && (!roster.running.empty() || !roster.waiting.empty())) {
            if (plan()) {
                if (num_flights_ == limits_.max_inflight) collect();
                return Pause::paused;
            }
        }
        if (num_flights_) {
            collect();
            return Pause::paused;
        }
        if (!roster.running.empty() || !roster.waiting.empty()) return Pause::stuck;
        if (!next_) return Pause::finished;
        now = std::max(now, next_->arrival_time);
        return Pause::paused;
    }

    void read_clock() { readings.push_back(now); }

    // Takes in what has arrived. False: the next arrival must be known first.
    bool ingest() {
        while (true) {
            if (!next_ && more_) return false;
            if (!next_ || next_->arrival_time > now) return true;
            Request& request = *next_;
            requests_.resize(request.index + 1);
            requests_[request.index] = std::move(next_);
            if (request.refused) {
                roster.end(request, State::rejected, now);
            } else {
                roster.waiting.push_back(&request);
            }
        }
    }

    // One plan and its launch. False if nothing was decided.
    bool plan() {
        Plan& plan = plans_[(first_flight_ + num_flights_) % plans_.size()];
        plan.begin(num_steps, now);
        step_.begin(plan, limits_.max_num_batched_tokens, seqs_of_a_plan());
        scheduler_->plan(step_);
        bool launching = !plan.requests.empty();
        if (!launching && plan.preempted.empty()) return false;
        decisions.record(plan, pool.evicted);
        plan.num_evicted = int64_t(pool.evicted.size());
        pool.evicted.clear();
        num_steps++;
        if (!launching) return true;
        planned_tokens += plan.num_tokens;
        kv_peak = std::max(kv_peak, pool.num_used());
        std::tie(plan.start, plan.end) = device_.launch(now, plan.starts, plan.lengths);
        num_flights_++;
        return true;
    }

    // A request in flight that cannot be planned again leaves each plan its share of the requests.
    int64_t seqs_of_a_plan() const {
        if (limits_.placeholders || limits_.max_inflight == 1) return limits_.max_num_seqs;
        int64_t present = int64_t(roster.running.size() + roster.waiting.size());
        int64_t share = (present + limits_.max_inflight - 1) / limits_.max_inflight;
        return std::min(std::max<int64_t>(1, share), limits_.max_num_seqs);
    }

    void collect() {
        Plan& plan = plans_[first_flight_];
        first_flight_ = (first_flight_ + 1) % plans_.size();
        num_flights_--;
        now = std::max(now, plan.end);
        read_clock();
        over_.clear();
        int64_t emitted = roster.commit(plan, now, over_);
        for (Request* request : over_) roster.finish(*request, State::finished, now);
        busy_time += std::max(0.0, plan.end - std::max(plan.start, last_end_));  // steps of a pipeline overlap
        last_end_ = std::max(last_end_, plan.end);
        if (limits_.logs) {
            auto running = int64_t(roster.running.size()), waiting = int64_t(roster.waiting.size());
            log.add(plan, now, {emitted, running, waiting, pool.num_used(), pool.num_cached});
        }
        for (Request* request : plan.requests)
            if (request->reported && !request->num_steps_in_flight) requests_[request->index].reset();
    }

    Limits limits_;
    std::unique_ptr<Scheduler> scheduler_;
    Device device_;
    Step step_;
    std::vector<std::unique_ptr<Request>> requests_;  // by index, until they were reported
    std::unique_ptr<Request> next_;                   // arrival
    bool more_ = true, ingesting_ = false;
    std::vector<Plan> plans_;  // a ring: those in flight, and the one that is being made
    size_t first_flight_ = 0;
    int64_t num_flights_ = 0, turns_ = 0;
    double last_end_ = 0.0;
    std::vector<Request*> over_;
};

}  // namespace headway
