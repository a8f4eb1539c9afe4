"""Orders by a key: who goes first, and that the queue stays sorted whatever happens to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from random import Random

import pytest
from helpers.policy_runs import Server, Steps, ask, compose, finishing, mean_completion, run

from core.compose.config import EngineConfig
from core.errors import ConfigError, PolicyError
from core.inputs import SLO, SamplingParams, Tags
from core.keyed import KeyOrder, MovingOrder
from core.outputs import RunResult

SEEDS = range(8)


def batch(seed: int, count: int = 12, spread: float = 0.0) -> list:
    rng = Random(seed)
    times = sorted(rng.uniform(0, spread) for _ in range(count))
    return [ask(t, rng.randint(1, 4), rng.randint(1, 60)) for t in times]


# ---- KeyOrder itself -------------------------------------------------------------------------------------


@dataclass
class Shuffled(KeyOrder):
    """A key that changes at random while requests wait; after every plan the queue must equal a fresh
    sort."""

    def setup(self, ctx) -> None:
        super().setup(ctx)
        self.keys: dict[int, int] = {}
        self.checked = 0

    def key(self, request):
        return self.keys.setdefault(request.index, request.index % 5)

    def order(self, view):
        for request in view.waiting[::3]:
            self.keys[request.index] = self.rng.randrange(5)
            self.rekey(request)
        offered = list(super().order(view))
        assert offered == sorted(view.waiting, key=self.rank)[: self.window]
        self.checked += len(offered) > 1
        return offered


@pytest.mark.parametrize("seed", SEEDS)
def test_a_keyed_queue_equals_a_fresh_sort_through_admissions_preemptions_and_rekeying(seed):
    order = Shuffled()
    engine = compose(engine=EngineConfig(block_size=2, num_blocks=40, max_num_seqs=4, max_inflight=2))
    roles = engine.roles.given | {"order": order}
    engine = type(engine)(roles, engine.config, seed=seed)
    result = engine.run(batch(seed, 40, spread=3.0))
    assert all(o.state == "finished" for o in result.outputs)
    assert result.num_preemptions > 0 and order.checked > 20


def test_rekey_of_a_request_that_does_not_wait_changes_nothing():
    engine = compose(order="priority")
    engine.add(ask(0.0, 1, 5))
    engine.step()
    (request,) = engine.running
    engine.roles["order"].rekey(request)
    assert list(engine.roles["order"].order(engine.view)) == []


# ---- priority, sjf, srpt, random -------------------------------------------------------------------------


def test_priority_is_smallest_first_and_then_by_arrival():
    asked = [ask(0.0, 1, 2, id, priority=p) for id, p in (("a", 2), ("b", 0), ("c", 1), ("d", 0))]
    assert finishing(run(asked, order="priority")) == ["b", "d", "c", "a"]


@pytest.mark.parametrize("seed", SEEDS)
def test_on_a_batch_srpt_is_no_worse_than_sjf_and_sjf_no_worse_than_fcfs(seed):
    asked = batch(seed)
    fcfs = mean_completion(run(asked))
    sjf = mean_completion(run(asked, order="sjf", predictor="oracle"))
    srpt = mean_completion(run(asked, order="srpt", predictor="oracle", scheduler="preemptive"))
    assert srpt <= sjf + 1e-9 and sjf <= fcfs + 1e-9
    assert sjf < fcfs  # no batch here is sorted by length


@pytest.mark.parametrize("seed", SEEDS)
def test_when_requests_arrive_over_time_preemption_lets_srpt_beat_sjf(seed):
    """Recomputation costs one step here, which srpt must earn back."""
    asked = batch(seed, 30, spread=8.0)
    sjf = mean_completion(run(asked, order="sjf", predictor="oracle"))
    result = run(asked, order="srpt", predictor="oracle", scheduler=("preemptive", {"mode": "recompute"}))
    assert mean_completion(result) < sjf
    assert result.num_preemptions > 0
    again, kept = (
        run(
            asked,
            order="srpt",
            predictor="oracle",
            scheduler=("preemptive", {"mode": mode}),
            server=Server(per_token=0.01),
        )
        for mode in ("recompute", "pause")
    )
    assert mean_completion(kept) < mean_completion(again)
    assert kept.num_pauses > 0 == kept.num_preemptions


def test_sjf_counts_the_whole_job_and_srpt_what_is_left_of_it():
    """A job of 30 tokens is preempted by memory pressure after 20: 10 are left, fewer than the 15 of the one
    that waits."""
    tail = {}
    for order in ("sjf", "srpt"):
        engine = compose(order=order, predictor="oracle")
        engine.add(ask(0.0, 1, 30, "long"))
        engine.add(ask(0.05, 1, 15, "short"))
        while len(next(iter(engine.running), ask_nothing).token_times) < 20:
            engine.step()
        long = next(iter(engine.running))
        # what a victim policy would have the step builder do
        engine.roster.preempt(long, 10**6, 0, engine.view.now)
        tail[order] = [r.id for r in engine.roles["order"].order(engine.view)]
    assert tail == {"sjf": ["short", "long"], "srpt": ["long", "short"]}


class ask_nothing:
    token_times = ()


def test_orders_that_need_lengths_say_so_when_no_predictor_is_chosen():
    for order in ("sjf", "srpt", "ltr", "least_slack"):
        with pytest.raises(ConfigError, match=f"order={order} needs predictor"):
            compose(order=order)


def test_a_random_order_keeps_a_requests_place_and_depends_on_the_seed_alone():
    asked = [ask(0.0, 1, 3) for _ in range(20)]
    first, again, other = (finishing(run(asked, order="random", seed=s)) for s in (1, 1, 2))
    assert first == again != other
    engine = compose(order="random")
    for a in asked:
        engine.add(a)
    engine.step()
    order = engine.roles["order"]
    before = [r.id for r in order.order(engine.view)]
    assert before == [r.id for r in order.order(engine.view)]


# ---- deadlines -------------------------------------------------------------------------------------------


def misses(lengths: list[int], deadlines: list[float], sequence: tuple[int, ...], step: float) -> int:
    now, late = 0.0, 0
    for i in sequence:
        now += lengths[i] * step
        late += now > deadlines[i] + 1e-9
    return late


def test_edf_misses_no_deadline_where_some_order_meets_them_all():
    feasible = fcfs_misses = 0
    for seed in range(60):
        rng = Random(seed)
        lengths = [rng.randint(1, 10) for _ in range(5)]
        deadlines = [rng.uniform(0.02, 0.35) for _ in range(5)]
        if all(misses(lengths, deadlines, p, 0.01) for p in permutations(range(5))):
            continue
        feasible += 1
        asked = [ask(0.0, 1, n, slo=SLO(e2el=d)) for n, d in zip(lengths, deadlines, strict=True)]
        late = {
            order: sum(o.finish_time > o.slo.e2el + 1e-9 for o in run(asked, order=order).outputs)
            for order in ("edf", "fcfs")
        }
        assert late["edf"] == 0, (seed, lengths, deadlines)
        fcfs_misses += late["fcfs"]
    assert feasible > 10 and fcfs_misses > 0


def test_edf_without_targets_is_fcfs_and_targets_come_before_none():
    asked = [
        ask(0.0, 1, 2, "none"),
        ask(0.0, 1, 2, "late", SLO(ttft=5.0)),
        ask(0.0, 1, 2, "soon", SLO(ttft=1.0)),
        ask(0.0, 1, 2, "none2"),
    ]
    assert finishing(run(asked, order="edf")) == ["soon", "late", "none", "none2"]


def test_a_preemptive_edf_meets_deadlines_of_requests_that_arrive_later():
    asked = [ask(0.0, 1, 50, "long", SLO(e2el=9.0)), ask(0.1, 1, 5, "urgent", SLO(e2el=0.1))]
    late = {}
    for scheduler in ("chunked", "preemptive"):
        result = run(asked, order="edf", scheduler=scheduler)
        late[scheduler] = [o.id for o in result.outputs if o.finish_time - o.arrival_time > o.slo.e2el]
    assert late == {"chunked": ["urgent"], "preemptive": []}


def test_least_slack_puts_the_longest_work_first_when_deadlines_are_equal():
    asked = [ask(0.0, 1, n, str(n), SLO(e2el=1.0)) for n in (3, 20, 10)] + [ask(0.0, 1, 1, "no target")]
    assert finishing(run(asked, order="least_slack", predictor="oracle")) == ["20", "10", "3", "no target"]


def test_program_fcfs_serves_the_next_turn_of_a_program_before_programs_that_came_later():
    """A.0 and X were there first; A.1 comes when B.0 waits already, and goes before it."""
    asked = [
        ask(0.0, 1, 5, "A.0", session="A"),
        ask(0.001, 1, 10, "X", session="X"),
        ask(0.002, 1, 5, "B.0", session="B"),
    ]
    asked.append(ask(0.1, 1, 5, "A.1", session="A", turn=1))
    assert finishing(run(asked, order="program_fcfs")) == ["A.0", "X", "A.1", "B.0"]
    assert finishing(run(asked, order="fcfs")) == ["A.0", "X", "B.0", "A.1"]
    alone = [replace(a, tags=Tags()) for a in asked]
    assert finishing(run(alone, order="program_fcfs")) == ["A.0", "X", "B.0", "A.1"]


# ---- learning to rank ------------------------------------------------------------------------------------


def starve(threshold: int) -> tuple[list[str], int]:
    """One long request against a stream of short ones; the place in which it finishes."""
    asked = [ask(0.001, 1, 40, "long")] + [ask(i * 0.015, 1, 2, f"s{i}") for i in range(60)]
    parameters = {"starvation_threshold": threshold, "priority_quantum": 100}
    order = finishing(run(asked, order=("ltr", parameters), predictor="oracle"))
    return order, order.index("long")


def test_ltr_serves_the_best_rank_first_and_promotes_who_has_waited_for_the_threshold():
    order, place = starve(10**6)
    assert place == 60  # last
    order, place = starve(20)
    assert 5 < place < 20  # after about 20 steps of 10 ms, two steps a short request


def test_ltr_demotes_a_promoted_request_after_its_quantum():
    parameters = {"starvation_threshold": 10, "priority_quantum": 5}
    asked = [ask(0.001, 1, 40, "long")] + [ask(i * 0.015, 1, 2, f"s{i}") for i in range(60)]
    steps = Steps()
    run(asked, order=("ltr", parameters), predictor="oracle", scheduler="preemptive", observers=[steps])
    ran = [r.step for r in steps.records if "long" in [q.id for q in r.plan.requests]]
    assert ran[:5] == [10, 11, 12, 13, 14]  # promoted after ten steps, for five
    assert ran[5] >= 25  # then displaced, and not promoted again for another ten


# ---- preemption by rank ----------------------------------------------------------------------------------


def test_a_waiting_request_displaces_running_ones_only_if_that_is_enough_to_start_it():
    """Both run; `big` needs more blocks than the one request behind it holds."""
    config = EngineConfig(block_size=1, num_blocks=12, max_num_seqs=4)
    asked = [
        ask(0.0, 4, 3, "kept", priority=1),
        ask(0.0, 4, 3, "last", priority=3),
        ask(0.011, 11, 1, "big", priority=2),
    ]
    result = run(asked, order="priority", scheduler="preemptive", engine=config)
    assert {o.id: o.num_preemptions for o in result.outputs} == {"kept": 0, "last": 0, "big": 0}
    asked[2] = ask(0.011, 6, 1, "fits", priority=2)
    result = run(asked, order="priority", scheduler="preemptive", engine=config)
    assert {o.id: o.num_preemptions for o in result.outputs} == {"kept": 0, "last": 1, "fits": 0}


def test_a_preempted_request_is_left_alone_until_it_has_generated_a_token():
    """Two urgent requests follow each other; without the rule, one whose recomputation takes long might never
    get through."""
    server = Server(overhead=0.01)
    asked = [ask(0.0, 8, 6, "victim", priority=9)] + [
        ask(0.1 * i, 1, 1, f"u{i}", priority=0) for i in range(1, 40)
    ]
    steps = Steps()
    result = run(
        asked,
        server=server,
        order="priority",
        scheduler=("preemptive", {"mode": "recompute", "chunk_size": 1}),
        observers=[steps],
    )
    victim = result.outputs[0]
    assert victim.state == "finished" and 0 < victim.num_preemptions <= 7


def test_preemption_by_rank_needs_an_order_that_ranks():
    with pytest.raises(ConfigError, match="order=lpm does not: choose one that goes by a key"):
        compose(scheduler="preemptive", order="lpm")
    with pytest.raises(ConfigError, match="Did you mean drop_tail"):
        compose(scheduler=("preemptive", {"mode": "droptail"}), order="priority")


# ---- ranks that move with time ---------------------------------------------------------------------------


@dataclass
class Ageing(MovingOrder):
    """Shortest answer first, but every second of waiting counts as `weight` tokens less."""

    weight: float = 0.0

    def key(self, request, now):
        return (request.sampling.max_tokens or 0) - self.weight * (now - request.arrival_time)


def aged(weight: float, scheduler: str, seed: int = 1) -> RunResult:
    rng = Random(seed)
    arrivals = [
        replace(ask(0.03 * i, 2, None), sampling=SamplingParams(max_tokens=rng.randint(2, 30)))
        for i in range(30)
    ]
    engine = compose(
        scheduler=scheduler,
        order="priority",
        engine=EngineConfig(block_size=4, num_blocks=64, max_num_seqs=2, check=True),
    )
    return type(engine)(engine.roles.given | {"order": Ageing(weight)}, engine.config).run(arrivals)


@pytest.mark.parametrize("scheduler", ["chunked", "preemptive"])
def test_a_rank_may_move_with_time(scheduler):
    """Waiting counts more and more, until the order is that of arrival; preemption follows it as well."""
    waits = []
    for weight in (0.0, 30.0, 1e6):
        result = aged(weight, scheduler)
        assert all(o.state == "finished" for o in result.outputs)
        waits.append(max(o.finish_time - o.arrival_time for o in result.outputs))
        if weight == 1e6:
            started = sorted(result.outputs, key=lambda o: o.first_scheduled_time)
            assert [o.index for o in started] == sorted(
                o.index for o in started
            ) and result.num_preemptions == 0
    assert waits[0] > waits[2]


def test_preemptive_takes_the_place_of_those_that_now_rank_behind():
    assert aged(0.0, "preemptive").num_pauses > 3


def test_a_moving_order_is_a_fresh_sort_at_every_step():
    class Checked(Ageing):
        def order(self, view):
            offered = list(super().order(view))
            assert offered == sorted(view.waiting, key=lambda r: (self.key(r, view.now), r.sort_key))
            checked.append(len(offered))
            return offered

    checked: list[int] = []
    engine = compose(engine=EngineConfig(block_size=2, num_blocks=40, max_num_seqs=2))
    Checked.window = 3
    type(engine)(engine.roles.given | {"order": Checked(2.0)}, engine.config).run(batch(1, 20, spread=2.0))
    assert max(checked) > 3  # beyond the window, too


@pytest.mark.parametrize(
    "key", [lambda r, now: 1 / 0, lambda r, now: float("nan"), lambda r, now: (1, float("nan"))]
)
def test_a_key_that_cannot_be_is_named(key):
    order = Ageing()
    order.key = key
    engine = compose(engine=EngineConfig(block_size=2, num_blocks=40))
    with pytest.raises(
        PolicyError, match=r"key\(\) (raised ZeroDivisionError|answered .*nan.*, which sorts nowhere)"
    ):
        type(engine)(engine.roles.given | {"order": order}, engine.config).run(batch(1, 5))


def test_a_queue_discipline_ranks_nobody_that_runs():
    order = compose(order="fcfs").roles["order"]
    assert order.rank_at(0.0) is None
    with pytest.raises(ConfigError, match="needs an order that ranks running requests too"):
        compose(scheduler="preemptive", order="fcfs")
