"""Several GPUs answer what one does, with NCCL inside CUDA graphs; a dead rank ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

from helpers.torch_engines import GREEDY, engine_of, shared_prompts, variant  # noqa: E402

from headway import Arrival, Engine, EngineConfig, ModelConfig, RankError, SamplingParams  # noqa: E402
from plugins.executors.torch import TorchExecutor  # noqa: E402
from plugins.kernels.compose import lookup  # noqa: E402
from plugins.kernels.torch import TorchKernels  # noqa: E402
from plugins.kernels.triton import TritonKernels  # noqa: E402
from plugins.parallel.config import MeshConfig  # noqa: E402

PROMPTS = shared_prompts(512)
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 128, "block_size": 4}
SPLIT, SPLIT_LIBRARY, WHOLE, LIBRARY = (
    ("split", "symmetric"),
    ("split", "library"),
    ("whole", "symmetric"),
    ("whole", "library"),
)
#: (tp, pp), and the ways to communicate that are tried in one start: how long steps do it, and with what
LAYOUTS = {
    "tp2": (2, 1, [SPLIT, WHOLE, SPLIT_LIBRARY, LIBRARY]), "pp2": (1, 2, [SPLIT_LIBRARY]),
    "tp4": (4, 1, [SPLIT]), "tp2pp2": (2, 2, [SPLIT, LIBRARY]),
}  # fmt: skip
SAMPLED = SamplingParams(temperature=0.8, top_k=20, seed=3, max_tokens=8, ignore_eos=True)


def on_gpus(tp: int, pp: int, all_reduce: str = "auto") -> TorchExecutor:
    executor = TorchExecutor(device="cuda", kv_cache_gb=0.05)
    kernels = TritonKernels(cuda_graphs=True)
    kernels.plugin_name = "triton"
    # every step of two tokens is long, in graphs and out of them
    parallel = MeshConfig(tp, pp, all_reduce=all_reduce, overlap_tokens=2)
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))),
        kernels,
        engine=EngineConfig(**LIMITS),
        backends=lookup({"torch": TorchKernels, "triton": TritonKernels}),
        parallel=parallel,
    )
    return executor


Answers = tuple[list[list[int]], list[list[int]]]


def answers(engine: Engine, name: str = "") -> Answers:
    """Greedy and sampled tokens under preemption. An engine runs several of these, each under another
    name."""
    preempted: list[int] = []

    def tokens(kind: str, sampling: SamplingParams, prompts: list[list[int]]) -> list[list[int]]:
        kind += name
        result = engine.run([Arrival(0.0, p, sampling, id=f"{kind}/{i}") for i, p in enumerate(prompts)])
        preempted.append(engine.roster.num_preemptions)  # of this run
        return [o.output_token_ids for o in result.outputs if o.id.startswith(f"{kind}/")]

    found = tokens("greedy", GREEDY, PROMPTS), tokens("sampled", SAMPLED, PROMPTS[:4])
    assert preempted[0] > 0
    return found


def small_pool(executor: TorchExecutor, depth: int, cache: str = "radix") -> Engine:
    return engine_of(executor, cache=cache, num_blocks=20, max_inflight=depth, max_model_len=128)


@pytest.fixture(scope="module")
def one_gpu() -> tuple[Answers, str]:
    """And the hash of all decisions."""
    engine = small_pool(on_gpus(1, 1), 1)
    return answers(engine), engine.decisions.hexdigest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_equal_one_gpus(one_gpu, layout):
    tp, pp, ways = LAYOUTS[layout]
    if tp * pp > torch.cuda.device_count():
        pytest.skip(f"needs {tp * pp} GPUs")
    executor = on_gpus(tp, pp)
    try:
        engine = small_pool(executor, 1)
        assert executor.execution.runner.mixed_graphs is not None
        assert (answers(engine), engine.decisions.hexdigest) == one_gpu
        engine, mesh = small_pool(executor, pp + 1, "none"), executor.execution.mesh
        for way in ways:
            if (mesh.long_steps, mesh.transport) != way:
                executor.execution.switch(*way)
            assert answers(engine, str(way)) == one_gpu[0], way
    finally:
        executor.close()


@pytest.mark.parametrize("all_reduce", ["library", "symmetric"])
def test_a_killed_rank_ends_the_run_though_the_gpu_waits_for_it(all_reduce):
    """In a process of its own, with a time limit: what fails here is that it waits for ever."""
    code = f"import test_parallel_gpu; test_parallel_gpu.a_rank_is_killed({all_reduce!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def a_rank_is_killed(all_reduce: str) -> None:
    executor = on_gpus(2, 1, all_reduce)
    engine = engine_of(executor, num_blocks=64, max_inflight=2, max_model_len=128)
    process = executor.execution.ranks._processes[1]
    engine.calls.callbacks["on_step_end"].append(
        (executor, lambda record: process.kill() if record.step == 8 else None)
    )
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL") as caught:
        engine.run([Arrival(0.0, p, GREEDY, id=f"k{i}") for i, p in enumerate(PROMPTS)])
    executor.close()
    assert caught.value.partial.status == "failed"
    assert time.monotonic() - began < 20
