"""SLAI: decodes wait until they are due, and no longer."""

from __future__ import annotations

from typing import Any

from helpers.policy_runs import Steps, ask, compose, finishing, run

from core.compose.config import EngineConfig
from core.inputs import SLO, Arrival

ROOMY = EngineConfig(block_size=4, num_blocks=256, max_num_seqs=8, max_num_batched_tokens=64, check=True)
STEP = 0.01  # seconds of the test server's


def compositions(
    asked: list[Arrival], engine: EngineConfig = ROOMY, **scheduler: Any
) -> list[dict[str, int]]:
    """Of every step, the tokens of each request."""
    steps = Steps()
    given = {"token_budget": 4} | scheduler
    run(asked, scheduler=("slai", given), engine=engine, observers=[steps])
    return [{q.id: n for q, n in zip(r.plan.requests, r.plan.lengths, strict=True)} for r in steps.records]


def test_a_decode_that_is_not_due_leaves_its_place_to_prompts():
    asked = [ask(0.0, 4, 3, "A"), ask(STEP / 2, 8, 1, "B")]
    waits = compositions(asked, time_between_tokens=1.0)
    assert waits[:4] == [{"A": 4}, {"B": 4}, {"B": 4}, {"A": 1}]
    at_once = compositions(asked, time_between_tokens=0.001)
    assert at_once[:3] == [{"A": 4}, {"A": 1, "B": 3}, {"A": 1, "B": 3}]


def test_a_decode_is_due_a_time_between_tokens_after_its_last_less_the_offset():
    """Prompts fill every step, so a decode is planned when it is due and not before."""
    asked = [ask(0.0, 4, 20, "A"), *(ask(STEP / 2, 400, 1, f"B{i}") for i in range(2))]
    for offset, gap in ((0, 11), (4, 7), (9, 2)):
        steps = compositions(asked, time_between_tokens=10 * STEP - 1e-9, offset=offset)
        places = [place for place, step in enumerate(steps) if "A" in step][1:12]
        assert {b - a for a, b in zip(places, places[1:], strict=False)} == {gap}


def test_a_request_s_own_slo_says_how_long_its_decodes_may_wait():
    asked = [
        ask(0.0, 2, 9, "strict", SLO(tpot=0.001)),
        ask(0.0, 2, 9, "loose", SLO(tpot=1.0)),
        ask(STEP / 2, 24, 1, "B"),
    ]
    steps = compositions(asked)
    while_prompts_last = [step for step in steps[1:] if "B" in step]
    assert all("strict" in step and "loose" not in step for step in while_prompts_last)


def test_decodes_are_due_earlier_when_memory_is_nearly_full():
    asked = [ask(0.0, 4, 12, "A"), ask(STEP / 2, 200, 1, "B")]

    def first_decode(num_blocks: int) -> int:
        engine = EngineConfig(
            block_size=4, num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=64, check=True
        )
        limits = {"time_between_tokens": 20 * STEP, "offset": 0, "offset_when_full": 15, "memory_limit": 0.01}
        steps = compositions(asked, engine, **limits)
        return next(place for place, step in enumerate(steps) if place and "A" in step)

    assert first_decode(60) < first_decode(4000)


def test_no_more_decodes_than_said_are_in_one_step():
    asked = [ask(0.0, 1, 6, f"r{i}") for i in range(4)]
    steps = compositions(asked, most_decodes=2, time_between_tokens=0.001)
    assert max(len(step) for step in steps[1:]) == 2
    assert sum(map(len, steps)) == 4 * 6


def test_spf_serves_the_shortest_prompt_of_the_strictest_tier_first():
    strict, loose = SLO(tpot=0.1), SLO(tpot=0.5)
    asked = [
        ask(0.0, 9, 1, "none"),
        ask(0.0, 9, 1, "loose long", loose),
        ask(0.0, 3, 1, "loose short", loose),
        ask(0.0, 8, 1, "strict long", strict),
        ask(0.0, 5, 1, "strict short", strict),
    ]
    result = compose(order="spf", engine=EngineConfig(max_num_seqs=1)).run(asked)
    expected = ["strict short", "strict long", "loose short", "loose long", "none"]
    assert finishing(result) == expected
