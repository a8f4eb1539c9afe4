// The C interface of the compiled engine, as plugins/native/library.py declares it. Every pointer that it answers is valid until the next
// call with the same engine.
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "engine.h"

using namespace headway;

extern "C" {

// Terms in roofline.h.
struct HeadwayTerms {
    double floor, sequence, decode_context, prompt_context, pair;
    const int64_t* knots;
    const double* slopes;
    const int64_t* sizes;
    int64_t num_knots, num_sizes;
};

struct HeadwaySetup {
    int64_t max_num_seqs, most_preemptions, max_num_batched_tokens, max_inflight, num_blocks, block_size;
    int64_t placeholders, caches, logs, pause_steps, pause_numbers;
    int64_t chunked, token_budget, chunk_size, whole_prompts;  // chunked=0: prefill_first
    int64_t watermark;                                         // blocks
    int64_t pp;
    double step_overhead, charge;
    double coefficients[10];
    int64_t measured;        // the step times below, not the coefficients above
    HeadwayTerms terms[2];   // of decodes alone, of other steps
};

struct HeadwayArrival {
    int64_t index, num_prompt_tokens, max_num_tokens, hidden_end;
    int64_t low, size, base, stride;
    int64_t root_key, salt, refused, num_stop_tokens;
    double time;
};

struct HeadwayEnded {
    int64_t index, state, reason, num_cached_tokens, num_preemptions, num_recomputed_tokens, num_tokens;
    double first_scheduled_time, finish_time;
};

struct HeadwayCounts {
    int64_t num_steps, planned_tokens, kv_peak, num_evictions, num_preemptions, num_running, num_waiting;
    double now, busy_time;
    uint8_t digest[16];
};

// A column: where it begins, and how many numbers it has.
struct HeadwayColumn {
    const void* values;
    int64_t length;
};
}

namespace {

struct Handle {
    Engine engine;
    std::vector<HeadwayEnded> ended;
    std::vector<int64_t> tokens;
    std::vector<double> times, readings;
};

template <class T>
HeadwayColumn column(const std::vector<T>& values) {
    return {values.data(), int64_t(values.size())};
}

std::unique_ptr<Scheduler> scheduler(const HeadwaySetup& s) {
    if (s.chunked) return std::make_unique<ChunkedPrefill>(s.token_budget, s.chunk_size, s.whole_prompts != 0);
    return std::make_unique<PrefillFirst>(s.watermark);
}

Terms terms(const HeadwayTerms& t) {
    return {t.floor, t.sequence, t.decode_context, t.prompt_context, t.pair,
            {t.knots, t.knots + t.num_knots}, {t.sizes, t.sizes + t.num_sizes}, {t.slopes, t.slopes + t.num_knots}};
}

Device device(const HeadwaySetup& s) {
    if (s.measured) return Device(terms(s.terms[0]), terms(s.terms[1]), s.charge);
    Coefficients cost;
    static_assert(sizeof cost == sizeof s.coefficients);
    std::memcpy(&cost, s.coefficients, sizeof cost);
    return Device(cost, s.pp, s.step_overhead, s.charge);
}

void report(Handle& handle, const Request& r) {
    int64_t count = int64_t(r.token_times.size());
    handle.ended.push_back({r.index, int64_t(r.state), int64_t(r.reason), r.num_cached_tokens, r.num_preemptions, r.num_recomputed_tokens, count,
                            r.first_scheduled_time, r.finish_time});
    handle.tokens.insert(handle.tokens.end(), r.tokens.end() - count, r.tokens.end());
    handle.times.insert(handle.times.end(), r.token_times.begin(), r.token_times.end());
}

}  // namespace

extern "C" {

Handle* headway_new(const HeadwaySetup* s) {
    try {
        Limits limits = {s->max_num_seqs, s->most_preemptions, s->max_num_batched_tokens, s->max_inflight, s->num_blocks, s->block_size,
                         s->placeholders != 0, s->caches != 0, s->logs != 0, s->pause_steps, s->pause_numbers};
        return new Handle{Engine(limits, scheduler(*s), device(*s)), {}, {}, {}, {}};
    } catch (const std::exception&) {
        return nullptr;
    }
}

// Of a block of a prefix cache: core/blocks.py.
int64_t headway_chain_key(int64_t parent_key, const int32_t* tokens, int64_t count) { return chain_key(parent_key, tokens, count); }

void headway_free(Handle* handle) { delete handle; }

// The next arrival, in order of time, with its prompt and the stop tokens that its stream can bring. False without memory for it.
int32_t headway_arrive(Handle* handle, const HeadwayArrival* a, const int64_t* prompt, const int64_t* stop_tokens) {
    try {
        auto request = std::make_unique<Request>();
        request->index = a->index, request->arrival_time = a->time, request->num_prompt_tokens = a->num_prompt_tokens;
        request->max_num_tokens = a->max_num_tokens, request->hidden_end = a->hidden_end;
        request->stream = {a->low, a->size, a->base, a->stride};
        request->stop_tokens.assign(stop_tokens, stop_tokens + a->num_stop_tokens);
        request->root_key = a->root_key, request->salt = int32_t(a->salt), request->refused = a->refused != 0;
        request->num_known = request->num_tokens = a->num_prompt_tokens;
        if (handle->engine.pool.caches && !request->refused) request->tokens.assign(prompt, prompt + a->num_prompt_tokens);
        handle->engine.arrive(std::move(request));
        return 1;
    } catch (const std::exception&) {
        return 0;
    }
}

void headway_arrivals_end(Handle* handle) { handle->engine.arrivals_end(); }

// A Pause, or -1 after an error.
int32_t headway_run(Handle* handle) {
    try {
        return int32_t(handle->engine.run());
    } catch (const std::exception&) {
        return -1;
    }
}

int32_t headway_abort(Handle* handle, int64_t index) { return handle->engine.abort(index); }

void headway_abort_all(Handle* handle) { handle->engine.abort_all(); }

// Who has ended since the last call: rows, all their tokens, all the times of these.
int64_t headway_ended(Handle* handle, HeadwayColumn out[3]) {
    handle->ended.clear(), handle->tokens.clear(), handle->times.clear();
    for (Request* request : handle->engine.roster.ended) report(*handle, *request);
    handle->engine.forget_ended();
    out[0] = column(handle->ended), out[1] = column(handle->tokens), out[2] = column(handle->times);
    return int64_t(handle->ended.size());
}

// The columns of the step log, which `headway_clear_log` empties.
void headway_log(Handle* handle, HeadwayColumn out[7]) {
    StepLog& log = handle->engine.log;
    int at = 0;
    for (auto* values : {&log.counts, &log.requests, &log.chunks, &log.preempted, &log.allocations, &log.sizes}) out[at++] = column(*values);
    out[at] = column(log.times);
}

void headway_clear_log(Handle* handle) { handle->engine.log.clear(); }

// What the clock has answered since the last call.
void headway_readings(Handle* handle, HeadwayColumn* out) {
    handle->readings.swap(handle->engine.readings);
    handle->engine.readings.clear();
    *out = column(handle->readings);
}

void headway_counts(Handle* handle, HeadwayCounts* out) {
    Engine& e = handle->engine;
    *out = {e.num_steps, e.planned_tokens, e.kv_peak, e.pool.num_evictions, e.roster.num_preemptions, int64_t(e.roster.running.size()),
            int64_t(e.roster.waiting.size()), e.now, e.busy_time, {}};
    e.decisions.digest(out->digest);
}
}
