"""The role `chunk`: how much of a prompt goes into a step."""

from __future__ import annotations

import pytest
from helpers.policy_runs import Server, Steps, ask, compose, run

from core.compose.config import EngineConfig
from core.errors import ConfigError
from core.inputs import SLO

CONFIG = EngineConfig(max_num_seqs=8, max_num_batched_tokens=2048)
WIDE = ("chunked", {"token_budget": CONFIG.max_num_batched_tokens})


def chunks(steps: Steps, id: str) -> list[int]:
    return [
        n for r in steps.records for q, n in zip(r.plan.requests, r.plan.lengths, strict=True) if q.id == id
    ]


def test_fixed_cuts_every_prompt_into_equal_chunks_and_leaves_decodes_alone():
    steps = Steps()
    run(
        [ask(0.0, 100, 3, "a"), ask(0.0, 70, 2, "b")],
        chunk=("fixed", {"chunk_size": 32}),
        scheduler=WIDE,
        engine=CONFIG,
        observers=[steps],
    )
    assert chunks(steps, "a") == [32, 32, 32, 4, 1, 1]
    assert chunks(steps, "b") == [32, 32, 6, 1]


def slow() -> Server:
    return Server(overhead=0.005, per_token=0.0001)


def gaps(steps: Steps, id: str) -> list[float]:
    ends = [r.end for r in steps.records if id in [q.id for q in r.plan.requests]]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def long_prompt_joins(size, tpot: float) -> tuple[Steps, list[int]]:
    """One request decodes with a TPOT target while a prompt of 1500 tokens comes in."""
    asked = [ask(0.0, 16, 300, "decode", SLO(tpot=tpot)), ask(0.02, 1500, 2, "prompt")]
    steps = Steps()
    choice = {"chunk": size} if size else {}
    run(asked, server=slow(), scheduler=WIDE, engine=CONFIG, observers=[steps], **choice)
    return steps, chunks(steps, "prompt")


def deadlines_met(steps: Steps, tpot: float) -> bool:
    ends = [r.end for r in steps.records if "decode" in [q.id for q in r.plan.requests]]
    return all(end <= ends[0] + k * tpot + 1e-9 for k, end in enumerate(ends))


def test_dynamic_chunk_keeps_every_token_of_a_decode_on_time():
    steps, sizes = long_prompt_joins(("dynamic_chunk", {"tile": 16, "floor": 0}), tpot=0.02)
    assert deadlines_met(steps, 0.02)
    plain, whole = long_prompt_joins(None, tpot=0.02)
    assert whole == [1500, 1] and max(gaps(plain, "decode")) > 0.15
    # Slack saved before goes into one large chunk, then every step takes what 20 ms leave: (0.020 - 0.005) /
    # 0.0001 - 1 = 149.
    # 160 where tiles left slack over
    assert 300 < sizes[0] < 1000 and len(sizes) > 5 and set(sizes[1:-2]) <= {144, 160}


def test_dynamic_chunk_takes_the_largest_tile_that_fits():
    steps, sizes = long_prompt_joins(("dynamic_chunk", {"tile": 1, "floor": 0}), tpot=0.02)
    assert deadlines_met(steps, 0.02)
    assert len(sizes) > 5 and set(sizes[1:-2]) <= {148, 149, 150}  # rounding carries over


def test_dynamic_chunk_without_decodes_gives_everything():
    steps = Steps()
    run(
        [ask(0.0, 1500, 2, "prompt")],
        server=slow(),
        chunk="dynamic_chunk",
        scheduler=WIDE,
        engine=CONFIG,
        observers=[steps],
    )
    assert chunks(steps, "prompt") == [1500, 1]


def test_dynamic_chunk_takes_its_floor_while_a_decode_is_late():
    """A target below the time of a decode step alone can't be met: prompts go on by the floor, all of them
    together.
    """
    steps, sizes = long_prompt_joins(("dynamic_chunk", {"floor": 100}), tpot=0.001)
    assert sizes == [100] * 15 + [1]
    asked = [ask(0.0, 16, 300, "decode", SLO(tpot=0.001)), ask(0.02, 70, 2, "a"), ask(0.02, 70, 2, "b")]
    run(
        asked,
        server=slow(),
        chunk=("dynamic_chunk", {"floor": 100}),
        scheduler=WIDE,
        engine=CONFIG,
        observers=[steps := Steps()],
    )
    assert (chunks(steps, "a"), chunks(steps, "b")) == ([70, 1], [30, 40, 1])


def test_dynamic_chunk_without_a_floor_waits_until_the_late_one_has_ended():
    steps, sizes = long_prompt_joins(("dynamic_chunk", {"floor": 0}), tpot=0.001)
    last = max(r.step for r in steps.records if "decode" in [q.id for q in r.plan.requests])
    first = min(r.step for r in steps.records if "prompt" in [q.id for q in r.plan.requests])
    assert first > last and sizes == [1500, 1]


def test_deadlines_count_from_arrival_so_that_who_is_early_has_slack():
    """A, due in 6 s and then every 50 ms, has its first token after 7 ms: B's prompt of 2,000 tokens, 205 ms,
    goes in at once.
    """
    asked = [ask(0.0, 16, 100, "A", SLO(ttft=6.0, tpot=0.05)), ask(0.1, 2000, 2, "B")]
    steps = Steps()
    run(asked, server=slow(), chunk="dynamic_chunk", scheduler=WIDE, engine=CONFIG, observers=[steps])
    assert chunks(steps, "B") == [2000, 1]
    due = [6.0 + 0.05 * n for n in range(100)]
    assert all(
        end <= by
        for end, by in zip(
            [r.end for r in steps.records if "A" in [q.id for q in r.plan.requests]], due, strict=True
        )
    )


def test_a_request_without_a_target_between_tokens_makes_no_demands():
    asked = [
        ask(0.0, 16, 300, "batch", SLO(e2el=60.0)),
        ask(0.0, 16, 300, "other", SLO(ttft=0.1)),
        ask(0.1, 1500, 2, "prompt"),
    ]
    steps = Steps()
    run(asked, server=slow(), chunk="dynamic_chunk", scheduler=WIDE, engine=CONFIG, observers=[steps])
    assert chunks(steps, "prompt") == [1500, 1]


def test_dynamic_chunk_needs_a_cost_model():
    server = Server()
    server.cost_model = None
    with pytest.raises(ConfigError, match="chunk=dynamic_chunk needs step_time"):
        compose(server=server, chunk="dynamic_chunk")


@pytest.mark.parametrize(
    "size", [("fixed", {"chunk_size": 0}), ("dynamic_chunk", {"floor": -1}), ("dynamic_chunk", {"tile": 0})]
)
def test_sizes_that_would_never_let_a_prompt_through_are_refused(size):
    with pytest.raises(ConfigError, match="expected"):
        compose(chunk=size)
