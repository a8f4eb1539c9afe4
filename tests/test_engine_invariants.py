"""DESIGN's invariants one by one: what the core enforces whatever a plugin does, and how its errors read."""

from __future__ import annotations

import pytest
from helpers.scripted import ask, engine, everybody

from core.compose.config import EngineConfig
from core.context import Truth
from core.engine import Engine
from core.errors import ConfigError, PolicyError
from core.inputs import SLO, Arrival, Tags
from core.measure.metrics import summarize
from core.outside import Observer
from core.policy import Admission, Eviction, LengthPrediction, Order, Predictor, Retention
from core.testing.oracle import OracleExecutor
from plugins.cache.hash import HashBlocks
from plugins.cache.none import NoCache


def tokens_of(running: Engine, output) -> list[int]:
    """What the request must have got, whatever happened on the way."""
    n = output.num_prompt_tokens
    return [running.executor.token(output.id, p) for p in range(n, n + len(output.output_token_ids))]


# ---- invariant 1: allocated + cached + free = total ------------------------------------------------------


def test_1_blocks_are_allocated_cached_or_free_after_every_step() -> None:
    running = engine(num_blocks=6)
    seen = []

    class Sums(Observer):
        def on_step(self, record):
            pool = running.pool
            seen.append((pool.num_used, pool.num_evictable, pool.num_free))

    running.observers.append(Sums())
    running.run([ask(10, 4), ask([2] * 9, 4), ask([3] * 9, 4, time=0.5)])
    assert all(sum(counts) == 6 for counts in seen) and len(set(seen)) > 3


def test_1_capacity_is_what_the_config_says_or_an_error() -> None:
    assert engine(num_blocks=7).pool.num_blocks == 7
    assert engine(num_blocks=None, executor=OracleExecutor(num_blocks=9)).pool.num_blocks == 9
    with pytest.raises(ConfigError, match="no memory is left for KV blocks"):
        engine(num_blocks=None, executor=OracleExecutor(num_blocks=0))
    with pytest.raises(ConfigError, match="engine.num_blocks=0: expected at least 1"):
        EngineConfig(num_blocks=0)


# ---- invariant 2: what is held is not evicted, what is shared is not written -----------------------------


def test_2_an_eviction_policy_that_names_a_held_block_is_stopped() -> None:
    class Wrong(Eviction):
        plugin_name = "eviction=wrong"

        def setup(self, ctx):
            super().setup(ctx)
            self.blocks = []

        def on_insert(self, block):
            self.blocks.append(block)

        def candidates(self, n):
            return iter(self.blocks)

    with pytest.raises(PolicyError, match="referenced or pinned.*on_evictable and on_in_use") as caught:
        engine(roles={"eviction": Wrong()}, num_blocks=5).run(
            [ask(12, 6), ask([2] * 4, 1), ask([3] * 4, 1, time=0.02)]
        )
    assert caught.value.plugin == "eviction=wrong"


def test_2_a_pinned_block_outlives_pressure_from_those_who_wait() -> None:
    class PinAll(Retention):
        def retain(self, request, kv, now):
            if request.tags.session:
                kv.pin(request, now + 100.0)

    first = ask([1, 2, 3, 4] * 2, 1, tags=Tags(session="s"))
    others = [ask([2, i % 5, 1, 1] * 2, 1, time=1.0 + i) for i in range(4)]
    again = ask([1, 2, 3, 4] * 2, 1, time=50.0)
    kept = engine(num_blocks=5, roles={"retention": PinAll()}).run([first, *others, again])
    lost = engine(num_blocks=5).run([first, *others, again])
    assert (kept.outputs[-1].num_cached_tokens, lost.outputs[-1].num_cached_tokens) == (4, 0)


def test_2_pins_end_in_time_and_give_way_when_nothing_else_is_left() -> None:
    class PinAll(Retention):
        def retain(self, request, kv, now):
            kv.pin(request, now + 1.0)

    running = engine(num_blocks=4, roles={"retention": PinAll()})
    result = running.run([ask([1] * 8, 1), ask([2] * 15, 1, time=0.1), ask([3] * 4, 1, time=9.0)])
    assert [o.state for o in result.outputs] == ["finished"] * 3
    assert result.outputs[1].finish_time < 1.0, "the pin was given up for it"
    running.roster.pins.expire(float("inf"))
    assert running.pool.num_used == 0 and running.pool.num_pinned == 0


def test_2_dropped_blocks_are_forgotten_at_once() -> None:
    class DropAll(Retention):
        def retain(self, request, kv, now):
            kv.drop(request)

    result = engine(roles={"retention": DropAll()}).run([ask(9, 1), ask(9, 1, time=1.0)])
    assert result.outputs[1].num_cached_tokens == 0


@pytest.mark.parametrize("max_inflight", [1, 2, 3])
def test_2_blocks_of_a_step_in_flight_stay_put(max_inflight: int) -> None:
    """The oracle executor fails on a reuse; pressure and preemptions make sure that there is something to
    reuse."""
    running = engine(num_blocks=5, max_inflight=max_inflight, roles={"cache": NoCache()})
    result = running.run([ask([i % 5, 1, 2], 9, time=0.01 * i) for i in range(6)])
    assert result.num_preemptions > 0
    assert all(o.output_token_ids == tokens_of(running, o) and o.state == "finished" for o in result.outputs)


# ---- invariant 3: prefix closure, references return to zero ----------------------------------------------


def test_3_a_cached_block_s_ancestors_are_cached() -> None:
    running = engine(num_blocks=5)
    running.run([ask([i, 1, 2, 3] * 3, 1, time=float(i)) for i in range(5)])
    assert running.pool.num_evictions > 0
    for block in running.pool.blocks:
        assert not block.cached or block.parent < 0 or running.pool.blocks[block.parent].cached


def test_3_a_cache_that_names_blocks_that_are_not_cached_is_stopped() -> None:
    class Wrong(HashBlocks):
        plugin_name = "cache=wrong"

        def match(self, request, known, limit):
            return [0] * limit

    with pytest.raises(PolicyError, match=r"match\(\) answered \[0\]") as caught:
        running = engine(roles={"cache": Wrong()})
        running.run([ask(3, 1), ask([1] * 5, 1, time=1.0)])
    assert caught.value.plugin == "cache=wrong" and caught.value.request == "r1"


def test_3_references_return_to_zero() -> None:
    running = engine(max_inflight=2)
    running.run([ask(9, 3), ask(9, 3), ask([1] * 7, 2, time=0.3)])
    assert running.pool.num_used == 0
    assert all(block.ref_count == 0 for block in running.pool.blocks)


# ---- invariant 4: budgets (StepBuilder's part is in test_step.py) ----------------------------------------


def test_4_steps_stay_within_tokens_and_sequences_and_name_nobody_twice() -> None:
    plans = []

    class Plans(Observer):
        def on_step(self, record):
            plans.append(record.plan)

    running = engine(max_num_seqs=3, max_num_batched_tokens=7, observers=[Plans()])
    running.run([ask(9, 4) for _ in range(8)])
    assert max(plan.num_tokens for plan in plans) == 7
    assert max(len(plan.requests) for plan in plans) == 3
    assert all(len({r.index for r in plan.requests}) == len(plan.requests) for plan in plans)
    assert all(plan.num_tokens == sum(plan.lengths) for plan in plans)


# ---- invariant 5: conservation; generated tokens survive preemption --------------------------------------


def test_5_everybody_who_arrives_has_one_outcome() -> None:
    arrivals = [ask(6, 2), ask(0, 2), ask(70, 2), ask([9], 1), ask(6, 2)]
    result = engine().run(arrivals)
    assert [o.state for o in result.outputs] == ["finished", "rejected", "rejected", "rejected", "finished"]
    summary = summarize(result)
    assert summary["num_requests"] == 5 == summary["completed"] + summary["rejected"] + summary["aborted"]


def test_5_generated_tokens_survive_preemption() -> None:
    running = engine(num_blocks=4, roles={"cache": NoCache()})
    result = running.run([ask([1, 1, 1, 2], 8), ask([2, 2, 1, 3], 8)])
    assert result.num_preemptions > 0
    for output in result.outputs:
        assert output.output_token_ids == tokens_of(running, output) and len(output.token_times) == 8


@pytest.mark.parametrize(
    ("arrival", "says"),
    [
        (ask(0), "empty prompt"),
        (ask(64), "prompt of 64 tokens does not fit the context of 64"),
        (ask([7]), "token id 7 is outside the vocabulary of 5"),
        (ask([-1]), "token id -1 is outside the vocabulary of 5"),
        (ask(4, 1, output_len=0), "output length 0: expected at least 1"),
        (ask(40, 20), "needs up to 15 KV blocks, the pool has 8"),
        (ask(4, 1, id="taken"), "id 'taken' is taken"),
    ],
)
def test_5_one_bad_request_is_refused_with_its_reason_and_the_others_finish(
    arrival: Arrival, says: str
) -> None:
    result = engine(num_blocks=8).run([ask(4, 1, id="taken"), arrival, ask(4, 1)])
    assert [o.state for o in result.outputs] == ["finished", "rejected", "finished"]
    assert says in result.outputs[1].finish_reason


# ---- invariant 6: progress -------------------------------------------------------------------------------


def test_6_planning_nothing_while_somebody_waits_is_an_error_that_shows_the_view() -> None:
    with pytest.raises(PolicyError, match="planned nothing although requests wait") as caught:
        engine(lambda step, view: None).run([ask(4, 1, id="stuck")])
    assert "plugin scheduler=scripted, step 0" in str(caught.value)
    assert "waiting (1): Request(stuck, waiting" in str(caught.value)


def test_6_two_requests_that_evict_each_other_still_get_done() -> None:
    def everyone_first(step, view):
        for request in (*view.waiting, *view.running):
            step.add(request, 1)

    running = engine(everyone_first, num_blocks=4, roles={"cache": NoCache()})
    result = running.run([ask([1] * 8, 6), ask([2] * 8, 6)])
    assert [o.state for o in result.outputs] == ["finished", "finished"]


# ---- invariant 7: what counts ----------------------------------------------------------------------------


def test_7_recomputed_tokens_are_no_cache_hits() -> None:
    def script(step, view):
        if view.step in (2, 4):
            step.preempt(view.running[0])
        else:
            everybody(step, view)

    (output,) = engine(script).run([ask(9, 6)]).outputs
    assert output.num_preemptions == 2 and output.num_recomputed_tokens > 0
    assert output.num_cached_tokens == 0


def test_7_rejected_requests_miss_their_slo() -> None:
    slo = SLO(ttft=10.0, e2el=10.0)
    result = engine().run([ask(4, 1, slo=slo), ask(0, 1, slo=slo)])
    assert summarize(result)["slo_attainment"] == 0.5


# ---- invariant 8: the truth is reached by those that declare it alone ------------------------------------


def test_8_only_who_declares_it_is_handed_the_truth_and_is_stamped() -> None:
    handed = {}

    class Asks(Predictor):
        def setup(self, ctx):
            super().setup(ctx)
            handed[type(self).__name__] = ctx.truth

        def predict(self, request):
            return LengthPrediction(1.0, 1.0)

    class Sees(Asks):
        plugin_name = "predictor=sees"
        sees_truth = True

    class Curious(Waiting):
        def on_arrival(self, request, now):
            self.predictor.predict(request)

        def setup(self, ctx):
            super().setup(ctx)
            self.predictor = ctx.roles["predictor"]

    class Dependent(Waiting):
        requires = ("predictor",)

    def stamps(predictor: Predictor, order: Order) -> list[str]:
        return engine(roles={"predictor": predictor, "order": order}).run([ask(4, 1)]).saw_truth

    assert stamps(Asks(), Curious()) == []
    assert stamps(Sees(), Waiting()) == [], "nobody asked it, and nobody needs it"
    assert stamps(Sees(), Curious()) == stamps(Sees(), Dependent()) == ["predictor=sees"]
    assert handed["Asks"] is None and isinstance(handed["Sees"], Truth)


def test_8_the_truth_says_how_long_the_answer_will_be() -> None:
    for arrival, length in ((ask(4, 9, output_len=3), 3), (ask(4, 9), 9), (ask(60, 9), 4)):
        running = engine()
        running.add(arrival)
        running.step()
        (request,) = running.running
        assert running.truth.output_len(request) == length


# ---- invariant 9: an exception in a plugin ---------------------------------------------------------------


def raises(self=None, *_args):
    raise ZeroDivisionError("by nought")


@pytest.mark.parametrize(
    ("role", "base", "method"),
    [
        ("order", Order, "order"),
        ("order", Order, "on_arrival"),
        ("order", Order, "on_admit"),
        ("order", Order, "on_step_end"),
        ("order", Order, "on_finish"),
        ("admission", Admission, "admit"),
        ("cache", HashBlocks, "match"),
        ("cache", HashBlocks, "insert"),
        ("eviction", Eviction, "on_insert"),
        ("eviction", Eviction, "on_evictable"),
        ("retention", Retention, "retain"),
    ],
)
def test_9_whatever_a_plugin_raises_names_it_the_step_and_the_view(
    role: str, base: type, method: str
) -> None:
    broken = type("Broken", (base,), {method: raises, "plugin_name": f"{role}=broken"})()

    def script(step, view):
        for request in view.running:
            step.add(request)
        for request in view.waiting if role != "order" else view.candidates(broken, 256):
            step.add(request)

    others = {"order": Waiting()} if role != "order" else {}
    if method != "order" and role == "order":
        broken.order = lambda view: view.waiting
    with pytest.raises(PolicyError, match="raised ZeroDivisionError: by nought") as caught:
        engine(script, roles={**others, role: broken}).run([ask(9, 2), ask(9, 2)])
    assert caught.value.plugin == f"{role}=broken"
    assert caught.value.step >= -1 and "view: step=" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Waiting(Order):
    def order(self, view):
        return view.waiting


def test_9_an_error_keeps_what_was_done() -> None:
    def script(step, view):
        if view.step == 5:
            raises()
        everybody(step, view)

    with pytest.raises(PolicyError) as caught:
        engine(script).run([ask(4, 2), ask(4, 20)])
    partial = caught.value.partial
    assert partial.status == "failed" and "by nought" in partial.error
    assert [o.state for o in partial.outputs] == ["finished", "aborted"]
    assert partial.outputs[1].output_token_ids, "its tokens so far are there"
