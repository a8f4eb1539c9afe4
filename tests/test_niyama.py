"""Niyama: deadlines weighed against work, who cannot make it goes last, a prompt that is half done yields."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.policy_runs import Server, Steps, ask, compose, finishing, run

from core.compose.config import EngineConfig
from core.errors import ConfigError
from core.inputs import SLO, Arrival

ONE = EngineConfig(max_num_seqs=1, max_num_batched_tokens=2048)
MANY = EngineConfig(block_size=4, num_blocks=2048, max_num_seqs=8, max_num_batched_tokens=64, check=True)


def fast() -> Server:
    return Server(overhead=0.001, per_token=1e-5)


def queued(alpha: float, *waiting: Arrival) -> list[str]:
    """Order of finishing of requests that wait behind one that runs for half a second."""
    first = ask(0.0, 1, 500, "first", SLO(ttft=0.001))
    order = ("niyama", {"alpha": alpha})
    return finishing(run([first, *waiting], server=fast(), order=order, engine=ONE))[1:]


def test_of_equal_deadlines_the_shorter_prefill_goes_first():
    asked = [ask(0.01, 1000, 1, "long", SLO(ttft=9.0)), ask(0.01, 100, 1, "short", SLO(ttft=9.0))]
    assert queued(0.008, *asked) == ["short", "long"]
    assert queued(0.0, *asked) == ["long", "short"]


@pytest.mark.parametrize(("behind", "order"), [(7.1, ["short", "long"]), (7.3, ["long", "short"])])
def test_alpha_is_what_a_token_of_prefill_weighs(behind: float, order: list[str]):
    """900 tokens more weigh 7.2 s at 8 ms each."""
    asked = [ask(0.01, 1000, 1, "long", SLO(ttft=20.0)), ask(0.01, 100, 1, "short", SLO(ttft=20.0 + behind))]
    assert queued(0.008, *asked) == order


def test_no_target_comes_last_and_an_e2el_target_leaves_time_for_the_answer():
    """256 decodes of 1 ms: a target of 5 s for the whole answer is one of 4.74 s for its prompt."""
    asked = [ask(0.01, 10, 1, "none"), ask(0.01, 10, 1, "whole", SLO(e2el=5.0))]
    asked += [ask(0.01, 10, 1, f"{ttft}", SLO(ttft=ttft)) for ttft in (4.5, 4.9)]
    assert queued(0.008, *asked) == ["4.5", "whole", "4.9", "none"]


def test_who_cannot_make_its_deadline_goes_behind_all_that_can():
    """When the first one ends, the prompt of "late" would be done too late: it goes last, before its deadline
    has passed."""
    asked = [ask(0.01, 2000, 1, "late", SLO(ttft=0.51)), ask(0.01, 100, 1, "far", SLO(ttft=50.0))]
    assert queued(0.0, *asked) == ["far", "late"]
    asked[0] = ask(0.01, 2000, 1, "late", SLO(ttft=0.6))
    assert queued(0.0, *asked) == ["late", "far"]


def test_relegated_requests_are_served_when_nobody_else_waits_and_in_their_order():
    asked = [ask(0.01, 10, 1, f"{i}", SLO(ttft=0.02 + 0.01 * i)) for i in (3, 1, 2)]
    assert queued(0.008, *asked) == ["1", "2", "3"]


def composed(scheduler: Any, **choices: Any) -> tuple[list[dict[str, int]], Any]:
    """A prompt of 200 tokens is half done when one of 20 with an earlier deadline comes."""
    asked = [ask(0.0, 200, 3, "long", SLO(ttft=30.0)), ask(0.0025, 20, 3, "urgent", SLO(ttft=2.0))]
    steps = Steps()
    result = run(
        asked, server=fast(), order="niyama", scheduler=scheduler, engine=MANY, observers=[steps], **choices
    )
    return [
        dict(zip([q.id for q in r.plan.requests], r.plan.lengths, strict=True)) for r in steps.records
    ], result


def test_a_better_prompt_overtakes_one_that_is_half_done_and_nothing_is_recomputed():
    steps, result = composed(("selective", {"token_budget": 64}))
    assert steps[:4] == [{"long": 64}, {"long": 64}, {"urgent": 20, "long": 44}, {"urgent": 1, "long": 28}]
    assert result.num_preemptions == sum(o.num_recomputed_tokens for o in result.outputs) == 0
    plain, _ = composed(("chunked", {"token_budget": 64}))
    assert plain[2:4] == [{"long": 64}, {"long": 8, "urgent": 20}]


def test_a_decode_is_never_passed_over():
    asked = [
        ask(0.0, 8, 60, "decode", SLO(ttft=30.0)),
        *(ask(0.002, 60, 2, f"{i}", SLO(ttft=1.0)) for i in range(6)),
    ]
    steps = Steps()
    run(
        asked,
        server=fast(),
        order="niyama",
        scheduler=("selective", {"token_budget": 32}),
        engine=MANY,
        observers=[steps],
    )
    ids = [[q.id for q in r.plan.requests] for r in steps.records]
    assert all("decode" in step for step in ids[:60])


def test_who_waits_for_blocks_keeps_nobody_from_going_on():
    """The urgent prompt does not fit beside what the long one needs: the long one is finished first."""
    config = EngineConfig(block_size=4, num_blocks=40, max_num_seqs=8, max_num_batched_tokens=32, check=True)
    asked = [ask(0.0, 120, 3, "long", SLO(ttft=30.0)), ask(0.0015, 60, 3, "urgent", SLO(ttft=2.0))]
    result = run(
        asked, server=fast(), order="niyama", scheduler=("selective", {"token_budget": 32}), engine=config
    )
    assert finishing(result) == ["long", "urgent"] and result.num_preemptions == 0


def test_who_finds_no_place_in_the_batch_keeps_nobody_from_going_on():
    config = EngineConfig(block_size=4, num_blocks=40, max_num_seqs=1, max_num_batched_tokens=32, check=True)
    asked = [ask(0.0, 120, 3, "long", SLO(ttft=30.0)), ask(0.0015, 20, 3, "urgent", SLO(ttft=2.0))]
    result = run(
        asked, server=fast(), order="niyama", scheduler=("selective", {"token_budget": 32}), engine=config
    )
    assert finishing(result) == ["long", "urgent"]


def test_selective_needs_an_order_that_ranks_what_runs():
    with pytest.raises(ConfigError, match="needs an order that ranks running requests"):
        compose(scheduler="selective")


def test_together_with_dynamic_chunks_more_deadlines_are_met_than_by_fcfs():
    """Three in four are interactive, the rest has half a minute: a burst that fcfs serves in turn."""
    asked = []
    for i in range(60):
        slo = SLO(ttft=0.4, tpot=0.05) if i % 4 else SLO(ttft=30.0)
        asked.append(ask(0.01 * i, 60 if i % 4 else 1500, 10, f"r{i}", slo))
    config = EngineConfig(block_size=16, num_blocks=4096, max_num_seqs=64, max_num_batched_tokens=2048)

    def missed(**choices: Any) -> int:
        outputs = run(asked, server=Server(overhead=0.005, per_token=1e-4), engine=config, **choices).outputs
        return sum(o.token_times[0] - o.arrival_time > o.slo.ttft for o in outputs)

    niyama = missed(scheduler=("selective", {"token_budget": 2048}), order="niyama", chunk="dynamic_chunk")
    assert niyama < missed(scheduler=("chunked", {"token_budget": 512})) / 2
