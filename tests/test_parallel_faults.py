"""A rank that dies, raises or hangs ends the run with its number and the cause; nothing that was started is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_kernels import FaultyKernels
from torch_engines import GREEDY, engine_of, shared_prompts, variant

from headway import Arrival, ModelConfig, ParallelConfig, RankError
from plugins.executors.torch import TorchExecutor

ROOT = Path(__file__).parent.parent
PROMPTS = shared_prompts(512)
DEADLINE = 20.0  # seconds in which every process must be gone


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def faulty_kernels(tmp_path, monkeypatch):
    """`kernels=faulty` as an installed package: ranks build kernels from their own registry."""
    installed = tmp_path / "faulty-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: faulty\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[headway]\nfaulty = faulty_kernels\n")
    monkeypatch.syspath_prepend(tmp_path)
    return FaultyKernels


def engine_on(tp: int, pp: int, timeout: float = 30.0, kernels: FaultyKernels | None = None):
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(name_or_path=str(variant("qwen3"))), kernels, parallel=ParallelConfig(tp=tp, pp=pp, timeout=timeout))
    return engine_of(executor, max_inflight=pp)


def failing(engine, on_step_end=None) -> RankError:
    """The error that ends the run; checks that it came in time, with what was done before, and that every rank is gone."""
    processes = engine.executor.execution.ranks._processes.values()
    if on_step_end is not None:
        engine.callbacks["on_step_end"].append((engine.executor, on_step_end))
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        engine.run([Arrival(0.0, p, GREEDY, id=f"p{i}") for i, p in enumerate(PROMPTS)])
    assert time.monotonic() - began < DEADLINE
    assert all(process.poll() is not None for process in processes)
    assert caught.value.partial.status == "failed" and len(caught.value.partial.outputs) == len(PROMPTS)
    engine.executor.close()
    return caught.value


def test_a_killed_rank_is_named_with_its_signal():
    engine = engine_on(1, 2)
    process = engine.executor.execution.ranks._processes[1]

    def kill(record):
        if record.step == 5:
            process.kill()

    assert str(failing(engine, kill)) == "rank 1 was killed by SIGKILL"


def test_a_rank_that_raises_sends_its_traceback(faulty_kernels):
    error = str(failing(engine_on(1, 3, kernels=faulty_kernels(fault="raise"))))
    assert error.startswith("rank 1 raised ValueError: a bug in a kernel")
    assert "faulty_kernels.py" in error


def test_a_rank_that_hangs_is_found_by_what_the_others_wait_for(faulty_kernels):
    error = str(failing(engine_on(2, 1, timeout=2.0, kernels=faulty_kernels(fault="hang"))))
    assert error.startswith("rank 1 hangs: at step ") and "parallel.timeout=2 s" in error


def test_another_run_can_follow_a_failed_one_in_the_same_process():
    engine = engine_on(2, 1)
    engine.executor.execution.ranks._processes[1].kill()
    assert str(failing(engine)) == "rank 1 was killed by SIGKILL"
    again = engine_on(2, 1)
    result = again.run([Arrival(0.0, PROMPTS[0], GREEDY)])
    again.executor.close()
    assert result.status == "finished"


# ---- the command line ------------------------------------------------------------------------------------------------


def started(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "run.py", "parallel.tp=2", "tracking=none", "workload.num_requests=64", "workload.output_len=400",
               f"hydra.run.dir={tmp_path}", "executor.kv_cache_gb=0.1", "engine.max_num_seqs=4", *arguments]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    for line in process.stdout:
        if "requests, " in line:  # the first line of progress: steps are running
            return process
    raise AssertionError(f"ended before its first step: exit code {process.wait()}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_the_end_of(ranks: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE
    while alive := [rank for rank in ranks if Path(f"/proc/{rank}").exists()]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        os.sched_yield()


def ended(process: subprocess.Popen[str], ranks: list[int], tmp_path: Path) -> tuple[int, str, dict]:
    """(exit code, what it printed, result.json); everything is gone by then."""
    printed, _ = process.communicate(timeout=DEADLINE)
    wait_for_the_end_of(ranks)
    return process.returncode, printed, json.loads((tmp_path / "result.json").read_text())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("victim", "number", "code", "status"), [("rank", signal.SIGKILL, 1, "failed"), ("driver", signal.SIGINT, 130, "interrupted")]
)
def test_the_command_ends_with_partial_results(tmp_path, victim, number, code, status):
    process = started(tmp_path)
    ranks = children(process.pid)
    os.kill(ranks[0] if victim == "rank" else process.pid, number)
    returned, printed, result = ended(process, ranks, tmp_path)
    assert (returned, result["status"]) == (code, status)
    assert result["summary"]["num_steps"] > 0
    assert victim == "driver" or "error: rank 1 was killed by SIGKILL" in printed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_ranks_do_not_outlive_a_killed_driver():
    script = (
        "from headway import ModelConfig, ParallelConfig; from plugins.executors.torch import TorchExecutor; import sys\n"
        "TorchExecutor(device='cpu').prepare(ModelConfig(), parallel=ParallelConfig(tp=2)); print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    ranks = children(process.pid)
    assert len(ranks) == 1
    process.kill()
    process.communicate(timeout=DEADLINE)
    wait_for_the_end_of(ranks)
