"""Admission: who is let in, who waits for memory, who is told no at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from random import Random

import pytest
from helpers.policy_runs import Server, ask, compose, run

from core.compose.config import EngineConfig
from core.errors import ConfigError, PolicyError
from core.inputs import SLO, SamplingParams
from core.policy import Admission, Admit, Defer, LengthPrediction, Predictor, Reject


def load(seed: int, n: int = 60) -> list:
    rng = Random(seed)
    return [ask(0.0, rng.randint(4, 40), rng.randint(10, 120)) for _ in range(n)]


TIGHT = EngineConfig(block_size=4, num_blocks=160, max_num_seqs=24, max_num_batched_tokens=256)


def test_always_decides_as_no_admission_does():
    asked = load(0)
    assert (
        run(asked, admission="always", engine=TIGHT).decision_hash == run(asked, engine=TIGHT).decision_hash
    )


# ---- past-future -----------------------------------------------------------------------------------------


def brute_force_peak(batch: list[tuple[int, int]], size: int) -> int:
    """Blocks held in every future step: each stores one token a step, as many as it has left, and the one
    that it samples last never.
    """
    most = 0
    for step in count(1):
        alive = [now - 1 + step for left, now in batch if -left >= step]
        if not alive:
            return most
        most = max(most, sum(-(-stored // size) for stored in alive))


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("seed", range(20))
def test_the_predicted_peak_is_what_a_walk_through_the_future_finds(seed, size):
    rng = Random(seed)
    batch = [(-rng.randint(1, 40), rng.randint(1, 50)) for _ in range(rng.randint(1, 12))]
    engine = compose(admission="past_future", predictor="oracle", engine=EngineConfig(block_size=size))
    assert engine.roles.admission.peak(batch) == brute_force_peak(batch, size)


@pytest.mark.parametrize("seed", range(6))
def test_with_true_lengths_and_nothing_reserved_past_future_never_preempts(seed):
    """Whole blocks of 16 tokens, and no prompt takes more than a step, whether it has one to itself or shares
    it with decodes.
    """
    config = EngineConfig(
        block_size=16, num_blocks=40, max_num_seqs=24, max_num_batched_tokens=2048, check=True
    )
    asked = load(seed)
    for scheduler in ("prefill_first", ("chunked", {"token_budget": 2048})):
        assert run(asked, scheduler=scheduler, engine=config).num_preemptions > 0
        exact = {"admission": ("past_future", {"reserved": 0}), "predictor": "oracle"}
        careful = run(asked, scheduler=scheduler, engine=config, **exact)
        assert careful.num_preemptions == 0 and careful.kv_peak > 36
        assert {o.state for o in careful.outputs} == {"finished"}


class Growing(Predictor):
    """Predicts one token more each time it is asked of anybody, and remembers of whom."""

    plugin_name = "predictor=growing"

    def setup(self, ctx):
        super().setup(ctx)
        self.asked: list[str] = []

    def predict(self, request):
        self.asked.append(request.id)
        return LengthPrediction(20.0, 20.0 + len(self.asked))


def test_past_future_draws_anew_at_every_decision_and_once_in_each():
    config = EngineConfig(block_size=4, num_blocks=12, max_num_seqs=4)
    engine = compose(admission="past_future", predictor="oracle", engine=config)
    predictor = Growing()
    predictor.setup(None)
    engine.roles.admission._predictor = predictor
    for id in "ab":
        engine.add(ask(0.0, 16, 9, id))
    engine.step()
    assert predictor.asked == ["a", "b"]  # "a" starts alone; its forecast joins the batch
    engine.step()
    assert predictor.asked[2:] == ["a", "b"]


def test_past_future_is_asked_before_a_preempted_request_starts_again():
    """Three start together, thought to be short, and preempt each other: who is preempted waits for the peak
    of the others to pass.
    """
    engine = compose(
        admission=("past_future", {"reserved": 0}),
        predictor=("constant", {"length": 4}),
        engine=EngineConfig(
            block_size=4, num_blocks=30, max_num_seqs=4, max_num_batched_tokens=256, check=True
        ),
    )
    answers = []
    admit = engine.roles.admission.admit

    def noted(request, view):
        answers.append((request.num_preemptions, type(answer := admit(request, view))))
        return answer

    engine.roles.admission.admit = noted
    result = engine.run([ask(0.0, 8, 60, id) for id in "abc"])
    assert result.num_preemptions > 0 and {o.state for o in result.outputs} == {"finished"}
    assert (1, Defer) in answers and (1, Admit) in answers


def test_an_admission_that_readmits_may_not_reject_who_was_preempted():
    class RefusesTheOld(Admission):
        readmits = True
        plugin_name = "admission=refuses"

        def admit(self, request, view):
            return Reject("no") if request.num_preemptions else Admit()

    engine = compose(engine=EngineConfig(block_size=4, num_blocks=12, max_num_seqs=4))
    engine.roles.admission = RefusesTheOld()
    with pytest.raises(PolicyError, match="expected Admit or Defer for a request that was preempted"):
        engine.run([ask(0.0, 8, 30, id) for id in "abc"])


@pytest.mark.parametrize("seed", range(4))
def test_with_true_lengths_past_future_never_preempts(seed):
    asked = load(seed)
    assert run(asked, engine=TIGHT).num_preemptions > 0
    careful = run(asked, admission=("past_future", {"reserved": 0.15}), predictor="oracle", engine=TIGHT)
    assert careful.num_preemptions == 0
    assert {o.state for o in careful.outputs} == {"finished"}


def test_past_future_learns_from_finished_requests():
    """History makes it preempt less than admitting everybody; the first predictions are guesses, so not
    never."""
    plain = careful = 0
    for seed in range(4):
        asked = load(seed, 120)
        plain += run(asked, engine=TIGHT).num_preemptions
        careful += run(
            asked, admission="past_future", predictor=("history", {"initial": 60.0}), engine=TIGHT
        ).num_preemptions
    assert careful < 0.3 * plain


def test_past_future_starts_a_request_alone_however_long_it_may_get():
    result = run(
        [ask(0.0, 4, 30)],
        admission=("past_future", {"reserved": 0.9}),
        predictor=("constant", {"length": 1e6}),
        engine=TIGHT,
    )
    assert result.outputs[0].state == "finished"


# ---- peak memory -----------------------------------------------------------------------------------------


def declared(seed: int, n: int = 60) -> list:
    """Requests that may ask for up to 120 tokens, and end when nobody knows."""
    rng = Random(seed)
    caps = [rng.randint(10, 120) for _ in range(n)]
    asked = [ask(0.0, rng.randint(4, 40), rng.randint(1, cap)) for cap in caps]
    return [replace(a, sampling=SamplingParams(max_tokens=cap)) for a, cap in zip(asked, caps, strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_peak_memory_never_preempts_and_starts_more_than_orca_whose_reservation_holds_to_the_end(seed):
    asked = declared(seed)
    config = EngineConfig(
        block_size=4, num_blocks=160, max_num_seqs=24, max_num_batched_tokens=1024, check=True
    )
    assert run(asked, scheduler="prefill_first", engine=config).num_preemptions > 0
    peak = run(asked, scheduler="prefill_first", admission="peak_memory", engine=config)
    orca = run(asked, scheduler="orca", engine=config)
    assert peak.num_preemptions == orca.num_preemptions == 0
    assert {o.state for o in peak.outputs} == {"finished"}
    assert peak.num_steps < orca.num_steps


def test_peak_memory_takes_a_request_without_max_tokens_to_fill_the_context():
    config = EngineConfig(block_size=4, num_blocks=160, max_num_seqs=24, max_num_batched_tokens=1024)
    result = run([ask(0.0, 4, 10, "a"), ask(0.0, 4, 10, "b")], admission="peak_memory", engine=config)
    assert result.outputs[1].first_scheduled_time >= result.outputs[0].finish_time


# ---- new token ratio -------------------------------------------------------------------------------------


def may_ask(prompt: int, cap: int, output: int, id: str, time: float = 0.0):
    return replace(ask(time, prompt, output, id), sampling=SamplingParams(max_tokens=cap))


RATIO = {"init": 0.5, "min_factor": 0.2, "decay_steps": 10, "retract_steps": 5}


def ratio_engine(num_blocks: int, *asked, **parameters):
    config = EngineConfig(
        block_size=1, num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=256, check=True
    )
    engine = compose(
        admission=("new_token_ratio", RATIO | parameters),
        scheduler="sglang",
        victim="fewest_outputs",
        engine=config,
    )
    for a in asked:
        engine.add(a)
    return engine


@pytest.mark.parametrize(("num_blocks", "together"), [(134, False), (135, True)])
def test_a_request_starts_when_all_it_may_need_fits_beside_half_of_what_the_others_may(
    num_blocks: int, together: bool
):
    """When B comes A holds 10 tokens, and half of its 99 more count: 49.5. B may need 5 + 70, less than what
    is left.
    """
    engine = ratio_engine(num_blocks, may_ask(10, 100, 50, "A"), may_ask(5, 70, 2, "B", 0.005))
    engine.step()
    engine.step()
    assert (len(engine.running) == 2) is together


def test_who_starts_counts_in_full_until_the_next_step():
    engine = ratio_engine(150, may_ask(10, 60, 50, "A"), may_ask(10, 60, 50, "B"), may_ask(4, 40, 2, "C"))
    engine.step()
    assert [r.id for r in engine.running] == ["A", "B"]  # 150 - 20 - 120 are not enough for C
    engine.step()
    assert [r.id for r in engine.running] == ["A", "B", "C"]  # half of what they may need, 59, is


def test_the_ratio_decays_with_decode_steps_to_its_least():
    engine = ratio_engine(1000, may_ask(10, 60, 30, "A"))
    seen = []
    while engine.step():
        seen.append(engine.roles.admission.ratio)
    assert seen[0] == 0.5  # a prefill
    assert seen[1:12] == pytest.approx([0.5 - 0.04 * i for i in range(1, 11)] + [0.1])
    assert seen[-1] == pytest.approx(0.1)


def test_after_a_retraction_the_ratio_is_what_was_used():
    """Two of 10 + 60 in a pool of 110 start when little is thought to be needed, and both need all."""
    engine = ratio_engine(110, may_ask(10, 60, 60, "A"), may_ask(10, 60, 60, "B", 0.025), init=0.3)
    before: dict[str, int] = {}
    while not engine.roster.num_preemptions:
        before = {r.id: r.num_output_tokens for r in engine.running}
        assert engine.step()
    assert set(before) == {"A", "B"} and [r.id for r in engine.running] == ["A"]
    assert engine.roles.admission.ratio == pytest.approx((before["A"] + 1 + 5) / 60)
    while engine.step():
        pass
    assert {o.state for o in engine.roster.finished} == {"finished"}


# ---- requests per minute ---------------------------------------------------------------------------------


def minute(over: str, limit: int = 3):
    """Every 10 s for 2 minutes a request of "busy", and one of "calm" each minute."""
    asked = [ask(10.0 * i, 2, 2, f"busy{i}", client="busy") for i in range(12)]
    asked += [ask(60.0 * i + 1, 2, 2, f"calm{i}", client="calm") for i in range(2)]
    return run(asked, admission=("rpm", {"limit": limit, "over": over}))


def test_rpm_takes_so_many_of_a_clients_requests_in_any_minute_and_rejects_the_rest():
    result = minute("reject")
    taken = [o.id for o in result.outputs if o.state == "finished"]
    assert taken == ["busy0", "calm0", "busy1", "busy2", "busy6", "calm1", "busy7", "busy8"]
    refused = next(o for o in result.outputs if o.id == "busy3")
    assert refused.finish_reason == "client 'busy' has 3 requests per 60 s, and this is one more"


def test_rpm_that_defers_starts_at_most_so_many_in_any_minute_and_all_in_the_end():
    result = minute("defer")
    assert {o.state for o in result.outputs} == {"finished"}
    starts = sorted(o.first_scheduled_time for o in result.outputs if o.tags.client == "busy")
    assert all(later - earlier >= 60.0 for earlier, later in zip(starts, starts[3:], strict=False))
    # 12 requests, 3 per minute: the last three come 3 minutes after 20 s
    assert starts[-1] == pytest.approx(200.0, abs=0.1)


# ---- early rejection -------------------------------------------------------------------------------------


def slow() -> Server:
    return Server(overhead=0.01, per_token=0.001)


def states(result) -> list[str]:
    return [o.state for o in result.outputs]


def test_early_reject_refuses_at_arrival_what_would_miss_its_ttft():
    """Each prompt takes 110 ms: under a target of 250 ms the first two can make it, the third would need
    330."""
    asked = [ask(0.0, 100, 1, slo=SLO(ttft=0.25)) for _ in range(4)]
    result = run(
        asked,
        server=slow(),
        admission=("early_reject", {"chunk_size": 100}),
        engine=EngineConfig(max_num_seqs=1),
    )
    assert states(result) == ["finished", "finished", "rejected", "rejected"]
    assert result.outputs[2].finish_reason.startswith("predicted TTFT of 0.33")
    assert result.outputs[2].finish_time == 0.0


def test_early_reject_asks_again_before_it_starts():
    """A later request of higher priority overtakes the second one, which then can't make it any more."""
    asked = [
        ask(0.0, 100, 1, priority=1),
        ask(0.0, 100, 1, "second", SLO(ttft=0.25), priority=2),
        ask(0.05, 100, 1, priority=0),
    ]
    parameters = ("early_reject", {"chunk_size": 100})
    result = run(
        asked, server=slow(), admission=parameters, order="priority", engine=EngineConfig(max_num_seqs=1)
    )
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
    assert states(run(asked, server=slow(), admission=own, engine=engine)) == [
        "finished",
        "finished",
        "rejected",
        "rejected",
    ]


def test_those_whom_early_reject_lets_in_make_their_target_on_a_server_as_predicted():
    rng = Random(1)
    asked = [ask(0.02 * i, rng.randint(10, 150), 1, slo=SLO(ttft=0.4)) for i in range(80)]
    result = run(
        asked,
        server=slow(),
        admission=("early_reject", {"chunk_size": 512}),
        engine=EngineConfig(max_num_seqs=1),
    )
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
