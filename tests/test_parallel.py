"""A model on several ranks answers what it answers on one, and the scheduler decides the same. gloo on the
CPU."""

from __future__ import annotations

import dataclasses
import gc
from itertools import product

import pytest
import torch
from helpers.torch_engines import (
    CACHES,
    GREEDY,
    SCHEDULERS,
    engine_of,
    generate,
    prepared,
    shared_prompts,
    variant,
)
from torch.distributed import distributed_c10d

from headway import Arrival, ModelConfig, SamplingParams, VirtualClock
from plugins.executors.torch import TorchExecutor
from plugins.parallel.config import MeshConfig

LAYOUTS = {"tp2": (2, 1), "tp4": (4, 1), "pp2": (1, 2), "pp3": (1, 3), "tp2pp2": (2, 2)}
PAIRS = list(product(SCHEDULERS, CACHES))
PROMPTS = [prompt[:n] for prompt, n in zip(shared_prompts(512), (14, 6, 14, 11, 13), strict=False)]
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SMALL_POOL = 12  # blocks of 4 tokens: two requests fit, and part of a third


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, monkeymodule):
    """The tiny model on the layout's ranks; one group of processes for all tests of a layout."""
    tp, pp = LAYOUTS[request.param]
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))),
        parallel=MeshConfig(tp=tp, pp=pp, overlap_tokens=8, timeout=60),
    )
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def monkeymodule():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the ranks: the machine may have few cores
        yield patch


class Ticks(VirtualClock):
    """Every reading is a millisecond after the last: time is a function of what the engine does."""

    def now(self) -> float:
        self.advance_to(super().now() + 1e-3)
        return super().now()


def decisions(executor: TorchExecutor, scheduler: str, cache: str, depth: int) -> tuple[str, list[list[int]]]:
    """(hash of all decisions, tokens) of a run in virtual time with preemption."""
    executor.clock = Ticks()
    engine = engine_of(executor, scheduler, cache, chunk=8, num_blocks=SMALL_POOL, max_inflight=depth)
    tokens = generate(engine, PROMPTS, SHORT, spacing=0.003)
    assert engine.roster.num_preemptions > 0
    assert engine.pool.num_used == 0
    return engine.decisions.hexdigest, tokens


def alone(placeholders: bool) -> TorchExecutor:
    """The same model on one rank; a pipeline cannot plan a token that is still being sampled, so its peer
    must not either."""
    executor = prepared(variant("qwen3"))
    executor.caps = dataclasses.replace(executor.caps, placeholders=placeholders)
    return executor


@pytest.mark.parametrize(("scheduler", "cache"), PAIRS)
def test_tokens_and_decisions_equal_those_of_one_rank(ranks, scheduler, cache):
    pp = ranks.execution.mesh.parallel.pp
    depth = pp if pp > 1 else 1 + PAIRS.index((scheduler, cache)) % 2
    assert decisions(ranks, scheduler, cache, depth) == decisions(alone(pp == 1), scheduler, cache, depth)


def test_sampling_and_logprobs_equal_those_of_one_rank(ranks):
    sampling = [
        SamplingParams(
            temperature=0.8, top_k=20, top_p=0.9, seed=7, max_tokens=6, ignore_eos=True, logprobs=2
        ),
        SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True),
        GREEDY,
    ]

    def run(executor):
        arrivals = [Arrival(0.0, PROMPTS[i], s, id=f"p{i}") for i, s in enumerate(sampling)]
        result = engine_of(executor, max_inflight=2).run(arrivals)
        return [o.output_token_ids for o in result.outputs], result.outputs[0].logprobs

    tokens, logprobs = run(ranks)
    expected, expected_logprobs = run(alone(True))
    assert tokens == expected
    for ours, theirs in zip(logprobs, expected_logprobs, strict=True):
        assert (ours.token, ours.rank, list(ours.best)) == (theirs.token, theirs.rank, list(theirs.best))
        assert torch.allclose(
            torch.tensor([ours.logprob, *ours.best.values()]),
            torch.tensor([theirs.logprob, *theirs.best.values()]),
            atol=1e-4,
        )


def test_a_rank_holds_its_part_of_weights_and_cache(ranks):
    parallel, whole = ranks.execution.mesh.parallel, prepared(variant("qwen3")).execution.model
    count = lambda model: sum(p.numel() for p in model.parameters() if p.dim() == 2)  # noqa: E731
    assert count(ranks.execution.model.model.layers) == count(whole.model.layers) * len(
        ranks.execution.model.model.layers
    ) // (4 * parallel.tp)
    assert ranks.kv_capacity(16) >= prepared(variant("qwen3")).kv_capacity(16) * parallel.tp


def test_ranks_share_the_tokens_of_long_steps(ranks):
    mesh = ranks.execution.mesh
    steps = {}
    begin = mesh.begin
    mesh.begin = lambda tokens: steps.setdefault(tokens, begin(tokens))
    try:
        generate(engine_of(ranks, chunk=14), PROMPTS, SHORT)
    finally:
        del mesh.begin
    assert {1 <= tokens < 8 for tokens in steps} == {True, False}  # short steps and long ones
    assert steps == {tokens: tokens if tokens < 8 else -(-tokens // mesh.parallel.tp) for tokens in steps}


def test_a_stage_has_pp_plans_in_flight(ranks):
    pp = ranks.execution.mesh.parallel.pp
    engine = engine_of(ranks, max_inflight=pp)
    depths = []
    launch = ranks.execution.launch
    ranks.execution.launch = lambda plan, now: (depths.append(len(engine.flights)), launch(plan, now))[1]
    try:
        generate(engine, PROMPTS, SHORT)
    finally:
        del ranks.execution.launch
    assert max(depths) == pp - 1  # the plan that is being launched comes on top


def test_what_ranks_meet_at_lasts_as_long_as_they_do(ranks):
    gc.collect()
    store = distributed_c10d._get_default_store()
    store.set("later", "value")  # as mapping the memory of peers does
    assert store.get("later") == b"value"
