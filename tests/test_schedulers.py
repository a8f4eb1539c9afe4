"""Schedulers: what a step holds and who starts, as the papers and engines that they are named after have
it."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from helpers.policy_runs import Server, Steps, ask, compose, run

from core.compose.config import EngineConfig
from core.inputs import Arrival, SamplingParams
from core.outputs import RunResult

ROOMY = EngineConfig(block_size=4, num_blocks=256, max_num_seqs=8, max_num_batched_tokens=64, check=True)


def compositions(steps: Steps) -> list[dict[str, int]]:
    """Of every step, the tokens of each request."""
    return [{q.id: n for q, n in zip(r.plan.requests, r.plan.lengths, strict=True)} for r in steps.records]


Ran = tuple[list[dict[str, int]], RunResult]


def composed(asked: list[Arrival], scheduler: Any, config: EngineConfig = ROOMY, **choices: Any) -> Ran:
    steps = Steps()
    result = run(asked, scheduler=scheduler, engine=config, observers=[steps], **choices)
    return compositions(steps), result


def limited(id: str, prompt: int, max_tokens: int, output: int, time: float = 0.0) -> Arrival:
    """Ends after `output` tokens, which nobody knows before; it may ask for max_tokens."""
    return Arrival(time, list(range(2, 2 + prompt)), SamplingParams(max_tokens=max_tokens), output, id)


def load(seed: int, n: int = 60) -> list[Arrival]:
    rng = Random(seed)
    asked = []
    for i in range(n):
        prompt, most = rng.randint(2, 30), rng.randint(4, 60)
        asked.append(limited(f"r{i}", prompt, most, rng.randint(1, most), 0.02 * i))
    return asked


def recomputed(result: RunResult) -> int:
    return sum(o.num_recomputed_tokens for o in result.outputs)


SMALL = EngineConfig(block_size=4, num_blocks=24, max_num_seqs=8, max_num_batched_tokens=64, check=True)

# ---- orca -------------------------------------------------------------------------------------------------


def test_orca_mixes_a_prompt_with_the_decodes_and_prefill_first_does_not():
    asked = [limited("A", 3, 6, 6), limited("B", 4, 2, 2, 0.015)]
    mixed, _ = composed(asked, "orca")
    assert mixed[:3] == [{"A": 3}, {"A": 1}, {"A": 1, "B": 4}]
    apart, _ = composed(asked, "prefill_first")
    assert apart[:4] == [{"A": 3}, {"A": 1}, {"B": 4}, {"A": 1, "B": 1}]


def test_orca_reserves_max_tokens_at_admission():
    """Two requests of up to 24 tokens in a pool of 32: the second waits, though both would end after a few
    tokens.
    """
    asked = [limited("A", 4, 20, 8), limited("B", 4, 20, 8)]
    config = EngineConfig(block_size=4, num_blocks=8, max_num_seqs=8, max_num_batched_tokens=64, check=True)
    steps, result = composed(asked, "orca", config)
    assert result.num_preemptions == 0
    assert not any({"A", "B"} <= step.keys() for step in steps)
    assert result.outputs[1].first_scheduled_time == result.outputs[0].finish_time


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_inflight", [1, 2])
def test_orca_never_preempts_where_prefill_first_does(seed: int, max_inflight: int):
    config = EngineConfig(4, 24, 8, 64, max_inflight, None, True)
    assert composed(load(seed), "prefill_first", config)[1].num_preemptions > 0
    result = composed(load(seed), "orca", config)[1]
    assert result.num_preemptions == 0
    assert {o.state for o in result.outputs} == {"finished"}


def test_orca_lets_nobody_pass_who_does_not_fit():
    """A holds half of the pool, B would take more than the rest, C little: C waits behind B."""
    asked = [limited("A", 4, 60, 10), limited("B", 4, 60, 2, 0.01), limited("C", 4, 4, 2, 0.02)]
    result = composed(asked, "orca", SMALL)[1]
    a, b, c = result.outputs
    assert b.first_scheduled_time >= a.finish_time and c.first_scheduled_time >= b.first_scheduled_time


def test_orca_takes_a_request_whose_max_tokens_exceed_the_pool_alone():
    asked = [limited("A", 4, 500, 8), limited("B", 4, 4, 2)]
    steps, result = composed(asked, "orca", EngineConfig(block_size=4, num_blocks=8, check=True))
    assert {o.state for o in result.outputs} == {"finished"}
    assert not any({"A", "B"} <= step.keys() for step in steps)


def test_orca_splits_only_the_first_prompt_of_a_step():
    asked = [limited("A", 6, 4, 4), limited("B", 8, 3, 3), limited("C", 25, 3, 3)]
    config = EngineConfig(block_size=4, num_blocks=256, max_num_seqs=8, max_num_batched_tokens=10, check=True)
    steps, _ = composed(asked, "orca", config)
    assert steps[:4] == [{"A": 6}, {"A": 1, "B": 8}, {"A": 1, "B": 1, "C": 8}, {"A": 1, "B": 1, "C": 8}]


# ---- sarathi, vllm v1 ------------------------------------------------------------------------------------

TIGHT = EngineConfig(block_size=4, num_blocks=16, max_num_seqs=8, max_num_batched_tokens=16, check=True)


def test_sarathi_admits_on_the_blocks_of_the_whole_prompt():
    asked = [ask(0.0, 32, 20, "A"), ask(0.0, 48, 2, "B")]
    result = composed(asked, ("chunked", {"token_budget": 16}), TIGHT)[1]
    assert result.outputs[1].first_scheduled_time >= result.outputs[0].finish_time
    assert recomputed(result) == result.num_preemptions == 0
    on_chunks = composed(asked, ("chunked", {"token_budget": 16, "admit_on": "chunk"}), TIGHT)[1]
    assert on_chunks.outputs[1].first_scheduled_time < on_chunks.outputs[0].finish_time
    assert recomputed(on_chunks) > 40


def test_sarathi_keeps_the_blocks_of_a_started_prompt_from_the_next_one():
    """B starts with a chunk of 15 tokens; what is free then is promised to the rest of it, so C waits."""
    asked = [ask(0.0, 4, 12, "A"), ask(0.01, 40, 2, "B"), ask(0.01, 20, 2, "C")]
    steps, result = composed(asked, ("chunked", {"token_budget": 16}), TIGHT)
    assert steps[1] == {"A": 1, "B": 15}
    assert result.outputs[2].first_scheduled_time >= result.outputs[1].finish_time
    assert recomputed(result) == 0


def test_a_budget_of_the_step_is_what_decodes_leave_and_one_of_each_prompt_is_a_cap():
    """Sarathi-Serve's tau = 16 with three decodes leaves 13 tokens for prompts together; chunk=fixed gives
    each of them 16.
    """
    decodes = [ask(0.0, 2, 40, f"d{i}") for i in range(3)]
    asked = [*decodes, ask(0.1, 30, 2, "A"), ask(0.1, 30, 2, "B")]
    tau, _ = composed(asked, ("chunked", {"token_budget": 16}))
    assert next(s for s in tau if "A" in s) == {"d0": 1, "d1": 1, "d2": 1, "A": 13}
    cap, _ = composed(asked, ("chunked", {"token_budget": 64}), chunk=("fixed", {"chunk_size": 16}))
    assert next(s for s in cap if "A" in s) == {"d0": 1, "d1": 1, "d2": 1, "A": 16, "B": 16}


def test_running_first_goes_by_admission_and_knows_no_phases():
    """A is the urgent one and is admitted later: it comes after B, whose prompt leaves it nothing."""
    asked = [ask(0.0, 3, 9, "B"), ask(0.0, 40, 2, "A", priority=-1)]
    config = EngineConfig(block_size=4, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=16, check=True)
    steps, _ = composed(asked, ("running_first", {}), config, order="priority")
    assert steps[:4] == [{"A": 16}, {"A": 16}, {"A": 8, "B": 3}, {"A": 1, "B": 1}]
    asked = [ask(0.0, 40, 3, "A"), ask(0.0, 3, 9, "B")]
    chunked, _ = composed(asked, ("running_first", {"chunk_size": 12}), config)
    assert chunked[:3] == [{"A": 12, "B": 3}, {"A": 12, "B": 1}, {"A": 12, "B": 1}]


def test_running_first_starts_nobody_in_a_step_that_preempts():
    asked = [ask(0.0, 20, 40, "A"), ask(0.0, 20, 40, "B"), ask(0.3, 1, 2, "C")]
    config = EngineConfig(block_size=4, num_blocks=16, max_num_seqs=8, max_num_batched_tokens=64, check=True)
    steps = Steps()
    result = run(asked, scheduler="running_first", victim="last_admitted", engine=config, observers=[steps])
    assert result.num_preemptions > 0
    assert all(not r.plan.admitted for r in steps.records if r.plan.preempted)


# ---- nano-vllm -------------------------------------------------------------------------------------------


def test_pd_split_splits_the_first_prompt_of_a_step_only():
    config = EngineConfig(block_size=4, num_blocks=256, max_num_seqs=8, max_num_batched_tokens=10, check=True)
    steps, _ = composed([ask(0.0, 6, 2, "A"), ask(0.0, 10, 2, "B")], "pd_split", config)
    assert steps[:2] == [{"A": 6}, {"B": 10}]
    steps, _ = composed([ask(0.0, 14, 2, "A"), ask(0.0, 7, 2, "B"), ask(0.0, 3, 2, "C")], "pd_split", config)
    assert steps[:3] == [{"A": 10}, {"A": 4}, {"B": 7, "C": 3}]


# ---- vllm v0 ---------------------------------------------------------------------------------------------


def test_the_watermark_is_left_free_by_who_starts_beside_others():
    """A pool of 20 blocks, 10% of it kept: a prompt of 15 blocks leaves 2 beside A's 3, one of 16 does
    not."""
    config = EngineConfig(block_size=4, num_blocks=20, max_num_seqs=8, max_num_batched_tokens=256, check=True)

    def starts_beside(prompt: int, watermark: float) -> bool:
        asked = [ask(0.0, 9, 3, "A"), ask(0.01, prompt, 2, "B")]
        a, b = composed(asked, ("prefill_first", {"watermark": watermark}), config)[1].outputs
        return b.first_scheduled_time < a.finish_time

    assert [starts_beside(tokens, 0.1) for tokens in (60, 61)] == [True, False]
    assert starts_beside(61, 0.0)
    alone = composed([ask(0.0, 77, 2, "A")], ("prefill_first", {"watermark": 0.1}), config)[1]
    assert alone.outputs[0].state == "finished"


def test_requests_start_after_so_many_steps_of_decodes_and_at_once_where_nobody_runs():
    """S-LoRA looks for new requests after every tenth decode; B comes while A, which came alone, decodes."""
    asked = [ask(0.0, 4, 40, "A"), ask(0.035, 4, 1, "B"), ask(9.0, 4, 1, "C")]
    for wait, place in ((10, 11), (0, 4)):
        steps, result = composed(asked, ("prefill_first", {"max_wait_tokens": wait}), SMALL)
        assert next(i for i, planned in enumerate(steps) if "B" in planned) == place
        assert result.outputs[2].first_scheduled_time == pytest.approx(9.0)


def test_fcfs_is_the_other_name_of_prefill_first():
    hashes = {composed(load(0), name, SMALL)[1].decision_hash for name in ("fcfs", "prefill_first")}
    assert len(hashes) == 1


# ---- sglang ----------------------------------------------------------------------------------------------


def test_sglang_fills_a_chunk_with_prompts_and_decodes_when_there_are_none():
    config = EngineConfig(block_size=4, num_blocks=256, max_num_seqs=8, max_num_batched_tokens=64, check=True)
    asked = [ask(0.0, 6, 3, "A"), ask(0.0, 10, 3, "B"), ask(0.005, 12, 2, "C")]
    steps, _ = composed(asked, ("sglang", {"chunk_size": 10}), config)
    assert steps[:5] == [
        {"A": 6, "B": 4},
        {"B": 6, "C": 4},
        {"C": 8},
        {"A": 1, "B": 1, "C": 1},
        {"A": 1, "B": 1},
    ]


def test_sglang_retracts_who_has_generated_least():
    """A has generated most when memory runs out, B least: B goes, though C arrived last and A first."""
    config = EngineConfig(block_size=4, num_blocks=14, max_num_seqs=8, max_num_batched_tokens=64, check=True)
    asked = [ask(0.0, 8, 40, "A"), ask(0.08, 8, 30, "B", priority=1), ask(0.08, 4, 30, "C")]
    steps = Steps()
    run(asked, scheduler="sglang", victim="fewest_outputs", engine=config, observers=[steps])
    first = next(r.plan for r in steps.records if r.plan.preempted)
    assert [r.id for r in first.preempted] == ["B"]
    assert "A" in [r.id for r in first.requests]


def test_a_server_without_pressure_takes_any_of_them():
    for scheduler in ("orca", "sglang", "running_first", "prefill_first", "chunked", "pd_split"):
        engine = compose(scheduler=scheduler, engine=ROOMY, server=Server())
        assert {o.state for o in engine.run(load(1)).outputs} == {"finished"}
