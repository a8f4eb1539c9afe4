"""Several GPUs answer what one does, with NCCL inside CUDA graphs; a dead rank ends the run."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

from torch_engines import GREEDY, engine_of, generate, shared_prompts, variant  # noqa: E402

from headway import Arrival, EngineConfig, ModelConfig, ParallelConfig, RankError, SamplingParams  # noqa: E402
from plugins.executors.torch import TorchExecutor  # noqa: E402
from plugins.kernels.compose import lookup  # noqa: E402
from plugins.kernels.torch import TorchKernels  # noqa: E402
from plugins.kernels.triton import TritonKernels  # noqa: E402

PROMPTS = shared_prompts(512)
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 128, "block_size": 4}
NEVER, LONG = 2048, 2  # parallel.overlap_tokens: no step here is long; every step of two tokens is, in graphs and out of them
LAYOUTS = {
    "tp2": (2, 1, "library", NEVER), "tp2 symmetric": (2, 1, "symmetric", NEVER), "pp2": (1, 2, "library", NEVER), "tp2pp2": (2, 2, "library", NEVER),
    "tp2 split": (2, 1, "symmetric", LONG), "tp2 split library": (2, 1, "library", LONG),
    "tp4 split": (4, 1, "symmetric", LONG), "tp2pp2 split": (2, 2, "symmetric", LONG),
}  # fmt: skip
SAMPLED = SamplingParams(temperature=0.8, top_k=20, seed=3, max_tokens=8, ignore_eos=True)


def on_gpus(tp: int, pp: int, all_reduce: str = "library", overlap_tokens: int = NEVER) -> TorchExecutor:
    executor = TorchExecutor(device="cuda", kv_cache_gb=0.05)
    kernels = TritonKernels(cuda_graphs=True)
    kernels.plugin_name = "triton"
    parallel = ParallelConfig(tp, pp, all_reduce=all_reduce, overlap_tokens=overlap_tokens)
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))), kernels, engine=EngineConfig(**LIMITS),
        backends=lookup({"torch": TorchKernels, "triton": TritonKernels}), parallel=parallel,
    )  # fmt: skip
    return executor


def answers(executor: TorchExecutor, depth: int) -> tuple[list[list[int]], list[list[int]], str]:
    """Greedy and sampled tokens under preemption, and the hash of all decisions."""
    engine = engine_of(executor, cache="radix", num_blocks=20, max_inflight=depth, max_model_len=128)
    tokens = generate(engine, PROMPTS)
    assert engine.num_preemptions > 0
    sampled = engine.run([Arrival(0.0, p, SAMPLED, id=f"s{i}") for i, p in enumerate(PROMPTS[:4])])
    return tokens, [o.output_token_ids for o in sampled.outputs if o.id.startswith("s")], engine.decisions.hexdigest


@pytest.fixture(scope="module")
def one_gpu():
    return answers(on_gpus(1, 1), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_equal_one_gpus(one_gpu, layout):
    tp, pp, all_reduce, overlap_tokens = LAYOUTS[layout]
    if tp * pp > torch.cuda.device_count():
        pytest.skip(f"needs {tp * pp} GPUs")
    executor = on_gpus(tp, pp, all_reduce, overlap_tokens)
    try:
        assert answers(executor, 1) == one_gpu
        assert answers(executor, pp + 1)[:2] == one_gpu[:2]
    finally:
        executor.close()


def test_a_killed_rank_ends_the_run_though_the_gpu_waits_for_it():
    executor = on_gpus(2, 1)
    engine = engine_of(executor, num_blocks=64, max_inflight=2, max_model_len=128)
    process = executor.execution.ranks._processes[1]
    engine.callbacks["on_step_end"].append((executor, lambda record: process.kill() if record.step == 8 else None))
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL") as caught:
        engine.run([Arrival(0.0, p, GREEDY, id=f"k{i}") for i, p in enumerate(PROMPTS)])
    executor.close()
    assert caught.value.partial.status == "failed"
    assert time.monotonic() - began < 20
