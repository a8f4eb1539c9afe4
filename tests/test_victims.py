"""Victims: whom they name first, what their choice costs, and how they preempt."""

from __future__ import annotations

from random import Random

import pytest
from helpers.policy_runs import Steps, ask, compose, run

from core.compose.config import EngineConfig
from core.errors import ConfigError
from core.measure.metrics import summarize
from core.policy import Need

VICTIMS = ("newest", "last_admitted", "oldest", "random", "lcf", "most_computed", "lowest_priority")


def running(victim: str):
    """Four running requests: arrivals a < b < c < d, computed 8, 20, 3 and 8 tokens, priorities 1, 0, 2,
    2."""
    engine = compose(victim=victim, engine=EngineConfig(max_num_seqs=4))
    for id, prompt, priority in (("a", 8, 1), ("b", 20, 0), ("c", 3, 2), ("d", 8, 2)):
        engine.add(ask(0.0, prompt, 9, id, priority=priority))
    engine.step()
    return engine


@pytest.mark.parametrize(
    ("victim", "order"),
    [
        ("newest", "dcba"),
        ("oldest", "abcd"),
        ("lcf", "cdab"),
        ("most_computed", "bdac"),
        ("lowest_priority", "dcab"),
    ],
)
def test_the_order_in_which_victims_are_named(victim, order):
    engine = running(victim)
    engine.view.begin_step(1, 0.01, 0)
    named = engine.roles.victim.victims(Need(engine.view.running[0], 1), engine.view)
    assert "".join(r.id for r in named) == order


def test_last_admitted_goes_by_admission_where_newest_goes_by_arrival():
    """Under order=priority "b" starts before "a", which arrived first."""
    named = {}
    for victim in ("newest", "last_admitted"):
        engine = compose(victim=victim, order="priority", engine=EngineConfig(max_num_seqs=4))
        for id, priority in (("a", 2), ("b", 0), ("c", 1)):
            engine.add(ask(0.0, 8, 9, id, priority=priority))
        engine.step()
        engine.view.begin_step(1, 0.01, 0)
        need = Need(engine.view.running[0], 1)
        named[victim] = "".join(r.id for r in engine.roles.victim.victims(need, engine.view))
    assert named == {"newest": "cba", "last_admitted": "acb"}


def test_last_admitted_counts_a_readmission_as_the_last():
    """ "b" arrived before "c", but was preempted and came back after it."""
    engine = compose(victim="last_admitted", engine=EngineConfig(max_num_seqs=4))
    for id in "abc":
        engine.add(ask(0.0, 8, 9, id))
    engine.step()
    engine.view.begin_step(1, 0.01, 0)
    b = engine.view.running[1]
    engine.builder.begin(1, 0.01, 64, 4)
    engine.builder.preempt(b)
    engine.step()  # not in the step that preempted it
    engine.step()
    engine.view.begin_step(3, 0.03, 0)
    assert [r.id for r in engine.roles.victim.victims(Need(b, 1), engine.view)] == ["b", "c", "a"]


def test_random_names_everybody_once_and_each_first_equally_often():
    engine = running("random")
    engine.view.begin_step(1, 0.01, 0)
    first = dict.fromkeys("abcd", 0)
    for _ in range(2000):
        named = [r.id for r in engine.roles.victim.victims(Need(engine.view.running[0], 1), engine.view)]
        assert sorted(named) == list("abcd")
        first[named[0]] += 1
    assert all(400 < count < 600 for count in first.values())


def pressure(seed: int, victim, observers=()):
    """Lengths that differ much, in a pool that holds about half of what runs."""
    rng = Random(seed)
    asked = [ask(0.0, rng.randint(4, 60), rng.randint(10, 120)) for _ in range(60)]
    config = EngineConfig(block_size=4, num_blocks=160, max_num_seqs=24, max_num_batched_tokens=256)
    return run(asked, victim=victim, engine=config, observers=observers)


def waste(victim: str) -> float:
    """Recomputed tokens over ten seeds."""
    return sum(summarize(pressure(seed, victim))["recomputed_tokens"] for seed in range(10))


def test_recomputation_orders_lcf_newest_random_most_computed():
    """The order that vLLM issue #54644 reports."""
    lcf, newest, random, most = (waste(v) for v in ("lcf", "newest", "random", "most_computed"))
    assert lcf < newest < random < most


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("mode", ["recompute", "drop_tail"])
def test_everybody_finishes_under_memory_pressure(victim, mode):
    result = pressure(3, (victim, {"mode": mode}))
    assert result.num_preemptions > 0
    assert {o.state for o in result.outputs} == {"finished"}


def test_dropping_the_tail_recomputes_less_than_giving_everything_back():
    for victim in ("newest", "lcf"):
        whole, tail = (
            sum(o.num_recomputed_tokens for o in pressure(3, (victim, {"mode": m})).outputs)
            for m in ("recompute", "drop_tail")
        )
        assert tail < whole


def test_a_preempted_request_of_lowest_priority_protects_the_urgent():
    rng = Random(5)
    asked = [ask(0.0, rng.randint(4, 60), rng.randint(10, 120), priority=i % 2) for i in range(40)]
    config = EngineConfig(block_size=4, num_blocks=160, max_num_seqs=24, max_num_batched_tokens=256)
    preempted = {}
    for victim in ("newest", "lowest_priority"):
        outputs = run(asked, victim=victim, order="priority", engine=config).outputs
        preempted[victim] = sum(o.num_preemptions for o in outputs if o.tags.priority == 0)
    assert preempted["lowest_priority"] < preempted["newest"]


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_mode_that_does_not_exist_is_refused_with_the_near_name(victim):
    with pytest.raises(ConfigError, match=r"victim.mode='drop-tail'.*Did you mean drop_tail"):
        compose(victim=(victim, {"mode": "drop-tail"}))


def test_preempted_requests_never_appear_in_the_same_step():
    steps = Steps()
    pressure(1, "random", [steps])
    assert any(r.plan.preempted for r in steps.records)
    for record in steps.records:
        assert not set(map(id, record.plan.preempted)) & set(map(id, record.plan.requests))
