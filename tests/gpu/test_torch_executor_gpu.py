"""The real engine on a GPU: the tokens of transformers and of the CPU, with every backend, overlap, and CUDA
graphs on and off."""

from __future__ import annotations

import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent))  # the helpers of the CPU tests

from helpers.torch_engines import (  # noqa: E402
    GREEDY,
    engine_of,
    generate,
    prepared,
    reference,
    reference_tokens,
    shared_prompts,
    variant,
)

from headway import Arrival, ConfigError, EngineConfig, ModelConfig, SamplingParams, load_registry  # noqa: E402
from plugins.executors.torch import TorchExecutor  # noqa: E402

PROMPTS = shared_prompts(512)
SMALL_POOL = {"block_size": 16, "num_blocks": 10}  # the longest request needs 4
RANDOM = SamplingParams(temperature=0.9, max_tokens=12, ignore_eos=True)
FILTERED = SamplingParams(temperature=1.2, top_k=60, top_p=0.9, min_p=0.01, max_tokens=12, ignore_eos=True)


@cache
def on_gpu(name, kernels, cuda_graphs, dtype=None, profile=False):
    registry = load_registry()
    executor = TorchExecutor(device="cuda", kv_cache_gb=0.1, profile=profile)
    backend = registry.get("kernels", kernels).build(cuda_graphs=cuda_graphs)
    executor.prepare(
        ModelConfig(name_or_path=str(variant(name)), dtype=dtype),
        backend,
        backends=lambda name: registry.get("kernels", name).build(),
    )
    return executor


@pytest.mark.parametrize(
    ("kernels", "cuda_graphs", "max_inflight"), list(product(("torch", "triton"), (False, True), (1, 2)))
)
@pytest.mark.parametrize("name", ["qwen3", "llama3_rope"])
def test_greedy_tokens_equal_transformers(name, kernels, cuda_graphs, max_inflight):
    expected = [reference_tokens(variant(name), tuple(p), GREEDY.max_tokens) for p in PROMPTS]
    for scheduler, cached, chunk in (("chunked", "hash", 7), ("fcfs", "none", 64), ("pd_split", "radix", 64)):
        engine = engine_of(
            on_gpu(name, kernels, cuda_graphs),
            scheduler,
            cached,
            chunk=chunk,
            max_inflight=max_inflight,
            **SMALL_POOL,
        )
        assert generate(engine, PROMPTS) == expected
        assert engine.roster.num_preemptions > 0


@pytest.mark.parametrize("sampling", [RANDOM, FILTERED])
def test_sampled_tokens_are_those_of_the_cpu(sampling):
    expected = generate(engine_of(prepared(variant("qwen3"))), PROMPTS, sampling)
    for kernels, cuda_graphs in product(("torch", "triton"), (False, True)):
        engine = engine_of(on_gpu("qwen3", kernels, cuda_graphs), max_inflight=2, **SMALL_POOL)
        assert generate(engine, PROMPTS, sampling) == expected


def test_batches_of_every_size_with_and_without_graphs():
    prompts = [[i + 1, i + 2, i + 3] for i in range(40)]
    # 40 running, then 39, 38 ...
    lengths = [SamplingParams(temperature=0, max_tokens=2 + i, ignore_eos=True) for i in range(40)]
    answers = []
    for cuda_graphs in (False, True):
        engine = engine_of(
            on_gpu("qwen3", "triton", cuda_graphs), max_inflight=2, max_num_seqs=40, block_size=16
        )
        result = engine.run([Arrival(0.0, p, s) for p, s in zip(prompts, lengths, strict=True)])
        answers.append([o.output_token_ids for o in result.outputs])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_bfloat16_logprobs_are_near_float32(kernels):
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=0, ignore_eos=True)
    engine = engine_of(on_gpu("qwen3", kernels, False, "bfloat16"), block_size=16, max_inflight=2)
    result = engine.run([Arrival(0.0, p, sampling) for p in PROMPTS])
    for prompt, output in zip(PROMPTS, result.outputs, strict=True):
        with torch.no_grad():
            logits = reference(variant("qwen3"))(torch.tensor([prompt + output.output_token_ids])).logits[0]
        for i, at in enumerate(output.logprobs):
            expected = logits[len(prompt) - 1 + i].log_softmax(-1)[at.token].item()
            # logits of about 3, 8 bits of mantissa, 4 layers
            assert at.logprob == pytest.approx(expected, abs=0.15)


def test_profile_measures_the_gpu():
    engine = engine_of(on_gpu("qwen3", "triton", False, profile=True), block_size=16, max_inflight=2)
    records = []
    engine.calls.callbacks["on_step_end"].append((engine.executor, records.append))
    generate(engine, PROMPTS)
    assert all(r.timings["gpu"] > 0 for r in records) and all(r.timings["gpu_idle"] >= 0 for r in records[1:])


def test_measured_capacity_leaves_room_and_more_is_refused():
    executor = TorchExecutor(device="cuda", gpu_memory_utilization=0.5)
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))),
        engine=EngineConfig(max_num_seqs=8, max_num_batched_tokens=512),
    )
    blocks = executor.kv_capacity(16)
    free, total = torch.cuda.mem_get_info()
    taken = blocks * 16 * executor.caps.model.kv_bytes_per_token
    assert 0.3 * total < taken < 0.5 * total
    with pytest.raises(ConfigError, match="lower engine.num_blocks"):
        engine_of(executor, block_size=16, num_blocks=blocks * 4)


def test_no_memory_left_for_blocks():
    executor = TorchExecutor(device="cuda", gpu_memory_utilization=0.001)
    executor.prepare(ModelConfig(name_or_path=str(variant("qwen3"))))
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        executor.kv_capacity(16)
