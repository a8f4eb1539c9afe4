"""Admission: who is let in, who waits for memory, who is told no at once."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest
from policy_runs import Server, ask, compose, run

from core.config import EngineConfig
from core.errors import ConfigError
from core.request import SLO


def load(seed: int, n: int = 60) -> list:
    rng = Random(seed)
    return [ask(0.0, rng.randint(4, 40), rng.randint(10, 120)) for _ in range(n)]


TIGHT = EngineConfig(block_size=4, num_blocks=160, max_num_seqs=24, max_num_batched_tokens=256)


def test_always_decides_as_no_admission_does():
    asked = load(0)
    assert run(asked, admission="always", engine=TIGHT).decision_hash == run(asked, engine=TIGHT).decision_hash


# ---- past-future -----------------------------------------------------------------------------------------------------


def brute_force_peak(batch: list[tuple[float, int]]) -> float:
    """Tokens held at every future step: each request grows by one a step until it has nothing left."""
    most = 0.0
    for step in count():
        alive = [(-left, now) for left, now in batch if -left >= step]
        if not alive:
            return most
        most = max(most, sum(now + step for _, now in alive))


@pytest.mark.parametrize("seed", range(20))
def test_the_predicted_peak_is_what_a_walk_through_the_future_finds(seed):
    rng = Random(seed)
    batch = [(-float(rng.randint(0, 30)), rng.randint(1, 50)) for _ in range(rng.randint(1, 12))]
    policy = compose(admission="past_future", predictor="oracle").roles["admission"]
    assert policy.peak(batch) == brute_force_peak(batch)


@pytest.mark.parametrize("seed", range(4))
def test_with_true_lengths_past_future_never_preempts(seed):
    asked = load(seed)
    assert run(asked, engine=TIGHT).num_preemptions > 0
    careful = run(asked, admission=("past_future", {"reserved": 0.15}), predictor="oracle", engine=TIGHT)
    assert careful.num_preemptions == 0
    assert {o.state for o in careful.outputs} == {"finished"}


def test_past_future_learns_from_finished_requests():
    """History makes it preempt less than admitting everybody; the first predictions are guesses, so not never."""
    plain = careful = 0
    for seed in range(4):
        asked = load(seed, 120)
        plain += run(asked, engine=TIGHT).num_preemptions
        careful += run(asked, admission="past_future", predictor=("history", {"initial": 60.0}), engine=TIGHT).num_preemptions
    assert careful < 0.3 * plain


def test_past_future_starts_a_request_alone_however_long_it_may_get():
    result = run([ask(0.0, 4, 30)], admission=("past_future", {"reserved": 0.9}), predictor=("constant", {"length": 1e6}), engine=TIGHT)
    assert result.outputs[0].state == "finished"


# ---- early rejection ---------------------------------------------------------------------------------------------------


def slow() -> Server:
    return Server(overhead=0.01, per_token=0.001)


def states(result) -> list[str]:
    return [o.state for o in result.outputs]


def test_early_reject_refuses_at_arrival_what_would_miss_its_ttft():
    """Each prompt takes 110 ms: under a target of 250 ms the first two can make it, the third would need 330."""
    asked = [ask(0.0, 100, 1, slo=SLO(ttft=0.25)) for _ in range(4)]
    result = run(asked, server=slow(), admission=("early_reject", {"chunk_size": 100}), engine=EngineConfig(max_num_seqs=1))
    assert states(result) == ["finished", "finished", "rejected", "rejected"]
    assert result.outputs[2].finish_reason.startswith("predicted TTFT of 0.33")
    assert result.outputs[2].finish_time == 0.0


def test_early_reject_asks_again_before_it_starts():
    """A later request of higher priority overtakes the second one, which then can't make it any more."""
    asked = [ask(0.0, 100, 1, priority=1), ask(0.0, 100, 1, "second", SLO(ttft=0.25), priority=2), ask(0.05, 100, 1, priority=0)]
    parameters = ("early_reject", {"chunk_size": 100})
    result = run(asked, server=slow(), admission=parameters, order="priority", engine=EngineConfig(max_num_seqs=1))
    assert states(result) == ["finished", "rejected", "finished"]
    assert result.outputs[1].finish_time > 0.2


def test_early_reject_refuses_who_would_slow_the_decodes_beyond_their_target():
    """A decode step of n requests takes 10 + n ms: five meet 15 ms, a sixth would not."""
    asked = [ask(0.03 * i, 1, 200, slo=SLO(tpot=0.0155)) for i in range(8)]
    result = run(asked, server=slow(), admission="early_reject", engine=EngineConfig(max_num_seqs=8))
    assert states(result) == ["finished"] * 5 + ["rejected"] * 3
    assert all("TBT" in o.finish_reason for o in result.outputs[5:])


def test_early_reject_leaves_requests_without_targets_alone_unless_it_has_its_own():
    asked = [ask(0.0, 100, 1) for _ in range(4)]
    engine = EngineConfig(max_num_seqs=1)
    assert states(run(asked, server=slow(), admission="early_reject", engine=engine)) == ["finished"] * 4
    own = ("early_reject", {"ttft": 0.25, "chunk_size": 100})
    assert states(run(asked, server=slow(), admission=own, engine=engine)) == ["finished", "finished", "rejected", "rejected"]


def test_those_whom_early_reject_lets_in_make_their_target_on_a_server_as_predicted():
    rng = Random(1)
    asked = [ask(0.02 * i, rng.randint(10, 150), 1, slo=SLO(ttft=0.4)) for i in range(80)]
    result = run(asked, server=slow(), admission=("early_reject", {"chunk_size": 512}), engine=EngineConfig(max_num_seqs=1))
    done = [o for o in result.outputs if o.state == "finished"]
    assert 10 < len(done) < 80
    assert all(o.token_times[0] - o.arrival_time <= 0.4 + 1e-9 for o in done)


@pytest.mark.parametrize(
    ("admission", "message"),
    [(("past_future", {"reserved": 1.0}), "reserved"), (("early_reject", {"chunk_size": 0}), "chunk_size")],
)
def test_admission_refuses_parameters_that_make_no_sense(admission, message):
    with pytest.raises(ConfigError, match=message):
        compose(admission=admission, predictor="oracle")
