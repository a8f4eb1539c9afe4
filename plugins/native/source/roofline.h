// executor=sim: step times of plugins/executors/cost.py or profile.py, the same operations in the same order, on pipeline stages in
// virtual time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace headway {

// What Roofline.coefficients answers, in its order: seconds per unit, of one stage.
struct Coefficients {
    double weights, linear, head, kv, pair, layers, reduce_latency, reduce, send_latency, send;
};

// Measured step times of one kind of step: Terms of plugins/executors/profile.py.
struct Terms {
    double floor, sequence, decode_context, prompt_context, pair;
    std::vector<int64_t> knots, sizes;
    std::vector<double> slopes;

    double seconds(const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths) const {
        int64_t tokens = 0, decodes = 0, prompts = 0, pairs = 0, count = int64_t(lengths.size());
        for (int64_t i = 0; i < count; i++) {
            tokens += lengths[i];
            if (lengths[i] == 1) {
                decodes += starts[i] + 1;
            } else {
                prompts += starts[i] + lengths[i];
                pairs += lengths[i] * starts[i] + lengths[i] * (lengths[i] + 1) / 2;
            }
        }
        auto size = std::lower_bound(sizes.begin(), sizes.end(), tokens);  // of the graph that holds them
        if (size != sizes.end()) tokens = *size;
        double products = 0.0;
        for (size_t k = 0; k < knots.size(); k++)
            if (tokens > knots[k]) products += slopes[k] * double(tokens - knots[k]);
        double rest = sequence * double(count);
        rest += decode_context * double(decodes);
        rest += prompt_context * double(prompts);
        rest += pair * double(pairs);
        return floor + products + rest;
    }
};

class Device {
   public:
    Device(const Coefficients& cost, int64_t pp, double step_overhead, double charge)
        : cost_(cost), overhead_(step_overhead / double(pp)), charge_(charge), stage_free_(pp, 0.0) {}

    // Steps of decodes alone and others take what was measured.
    Device(const Terms& decode, const Terms& mixed, double charge)
        : measured_(true), decode_(decode), mixed_(mixed), cost_(), overhead_(0.0), charge_(charge), stage_free_(1, 0.0) {}

    // When a step with these chunks begins and ends that is launched now.
    std::pair<double, double> launch(double now, const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths) {
        host_free_ = std::max(now, host_free_) + charge_ * double(lengths.size());
        auto [stage, send] = measured_ ? std::pair(step_time(starts, lengths), 0.0) : stage_time(starts, lengths);
        if (!measured_) stage += overhead_;
        double begin = std::max(host_free_, stage_free_[0]), at = begin;
        for (double& free : stage_free_) {
            at = std::max(at, free) + stage;
            free = at;
            at += send;
        }
        return {begin, stage_free_.back()};
    }

   private:
    double step_time(const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths) const {
        bool decodes = std::all_of(lengths.begin(), lengths.end(), [](int64_t n) { return n == 1; });
        return (decodes ? decode_ : mixed_).seconds(starts, lengths);
    }

    std::pair<double, double> stage_time(const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths) const {
        int64_t tokens = 0, cached = 0, products = 0, squares = 0, count = int64_t(lengths.size());
        for (int64_t i = 0; i < count; i++) {
            tokens += lengths[i];
            cached += starts[i];
            products += starts[i] * lengths[i];
            squares += lengths[i] * lengths[i];
        }
        int64_t pairs = tokens == count ? cached + tokens : products + (squares + tokens) / 2;
        double linear = std::max(cost_.weights, double(tokens) * cost_.linear + double(count) * cost_.head);
        double attention = std::max(double(cached + 2 * tokens) * cost_.kv, double(pairs) * cost_.pair);
        double reduces = cost_.reduce_latency + double(tokens) * cost_.reduce;
        return {linear + attention + cost_.layers + reduces, cost_.send_latency + double(tokens) * cost_.send};
    }

    bool measured_ = false;
    Terms decode_, mixed_;
    Coefficients cost_;
    double overhead_, charge_, host_free_ = 0.0;
    std::vector<double> stage_free_;
};

}  // namespace headway
