"""A rank that dies, raises or hangs ends the run with its number and the cause; nothing that was started is
left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.faulty_kernels import FaultyKernels
from helpers.torch_engines import GREEDY, engine_of, shared_prompts, variant

from headway import Arrival, ModelConfig, RankError
from plugins.executors.torch import TorchExecutor
from plugins.parallel import channel as wire
from plugins.parallel import launch
from plugins.parallel.channel import Channel
from plugins.parallel.config import MeshConfig
from plugins.parallel.start import SIGNALS

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
    (installed / "entry_points.txt").write_text("[headway]\nfaulty = helpers.faulty_kernels\n")
    monkeypatch.syspath_prepend(tmp_path)
    return FaultyKernels


def engine_on(tp: int, pp: int, timeout: float = 30.0, kernels: FaultyKernels | None = None):
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))),
        kernels,
        parallel=MeshConfig(tp=tp, pp=pp, timeout=timeout),
    )
    return engine_of(executor, max_inflight=pp)


def failing(engine, on_step_end=None) -> RankError:
    """The error that ends the run; checks that it came in time, with what was done before, and that every
    rank is gone."""
    processes = engine.executor.execution.ranks._processes.values()
    if on_step_end is not None:
        engine.calls.callbacks["on_step_end"].append((engine.executor, on_step_end))
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


# ---- the command line ------------------------------------------------------------------------------------


def started(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "run.py",
        "parallel.tp=2",
        "tracking=none",
        "workload.num_requests=64",
        "workload.output_len=400",
        f"hydra.run.dir={tmp_path}",
        "executor.kv_cache_gb=0.1",
        "engine.max_num_seqs=4",
        *arguments,
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
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
    ("victim", "number", "code", "status"),
    [("rank", signal.SIGKILL, 1, "failed"), ("driver", signal.SIGINT, 130, "interrupted")],
)
def test_the_command_ends_with_partial_results(tmp_path, victim, number, code, status):
    process = started(tmp_path)
    ranks = children(process.pid)
    os.kill(ranks[0] if victim == "rank" else process.pid, number)
    returned, printed, result = ended(process, ranks, tmp_path)
    assert (returned, result["status"]) == (code, status)
    assert result["summary"]["num_steps"] > 0
    assert victim == "driver" or "error: rank 1 was killed by SIGKILL" in printed


DRIVER = (
    "from headway import ModelConfig; from plugins.executors.torch import TorchExecutor; "
    "from plugins.parallel.config import MeshConfig; import sys\n"
    "TorchExecutor(device='cpu').prepare(ModelConfig(), parallel=MeshConfig(tp=2)); print('ready', "
    "flush=True); sys.stdin.read()"
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize("moment", ["has just started its rank", "waits while its rank loads", "is ready"])
def test_ranks_do_not_outlive_a_killed_driver(moment):
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if moment == "is ready":
        assert process.stdout.readline() == "ready\n"
    while not (ranks := children(process.pid)):
        os.sched_yield()
    while moment.startswith("waits") and "libtorch" not in Path(f"/proc/{ranks[0]}/maps").read_text():
        os.sched_yield()
    assert len(ranks) == 1
    process.kill()
    process.communicate(timeout=DEADLINE)
    wait_for_the_end_of(ranks)


# ---- a rank and its driver, from the first instruction on ------------------------------------------------


def first_lines(driver: int | None = None) -> tuple[subprocess.Popen[str], Channel]:
    """A rank as the driver starts it, and the driver's end of its orders. It has not imported torch yet."""
    (ours, theirs), (store, their_store) = socket.socketpair(), socket.socketpair()
    store.close()
    ends = (theirs.fileno(), their_store.fileno())
    command = [
        sys.executable,
        "-m",
        "plugins.parallel.start",
        "1",
        *map(str, ends),
        str(driver or os.getpid()),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with theirs, their_store, launch.signals_blocked():
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=ends,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return process, Channel(ours)


def test_a_rank_beats_before_it_imports_torch_and_ends_with_its_driver():
    process, channel = first_lines()
    assert channel.receive() == (wire.BEAT, bytes(16))
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    channel.close()
    assert process.communicate(timeout=DEADLINE)[0] == ""


def test_a_rank_whose_driver_was_gone_before_its_first_line_ends():
    process, channel = first_lines()
    channel.close()
    assert process.communicate(timeout=DEADLINE)[0] == ""


def test_a_rank_ends_though_another_process_has_inherited_its_drivers_sockets():
    # the sockets stay open, its parent is another
    process, channel = first_lines(driver=1 if os.getppid() != 1 else 2)
    assert process.communicate(timeout=DEADLINE)[0] == ""
    channel.close()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signals_to_a_rank_are_the_drivers_business_from_its_first_instruction_on(number):
    process, channel = first_lines()
    os.kill(process.pid, number)
    assert channel.receive()[0] == wire.BEAT
    os.kill(process.pid, number)
    assert channel.receive()[0] == wire.BEAT and process.poll() is None
    channel.close()
    assert process.communicate(timeout=DEADLINE)[0] == ""  # no traceback


@pytest.mark.parametrize("moment", ["before it imports anything", "while it imports torch"])
def test_a_rank_that_is_stopped_before_it_has_loaded_is_named_in_time(monkeypatch, moment):
    start = launch.Ranks._start
    processes = []

    def started(ranks, rank, kind):
        start(ranks, rank, kind)
        process = ranks._processes[rank]
        processes.append(process)
        maps = Path(f"/proc/{process.pid}/maps")
        while moment != "before it imports anything" and "libtorch" not in maps.read_text():
            os.sched_yield()
        process.send_signal(signal.SIGSTOP)

    monkeypatch.setattr(launch.Ranks, "_start", started)
    monkeypatch.setitem(launch.SILENCE, "cpu", 1.0)
    with pytest.raises(RankError, match=r"rank 1 hangs: not a sign of life for 2 s \(parallel.timeout=1\)"):
        engine_on(2, 1, timeout=1.0)
    assert processes[0].poll() == -signal.SIGKILL


def test_a_rank_that_is_stopped_while_steps_run_is_named():
    engine = engine_on(2, 1, timeout=3.0)
    process = engine.executor.execution.ranks._processes[1]
    error = str(
        failing(engine, lambda record: process.send_signal(signal.SIGSTOP) if record.step == 5 else None)
    )
    assert error == "rank 1 hangs: not even a sign of life; gave up after parallel.timeout=3 s"


@pytest.mark.parametrize(
    "junk",
    [b"B\x11\x00\x00\x00", b"A\x02\x00\x00\x00{}", b"\x80\x04\x95K\x00"],
    ids=["size", "body", "pickle"],
)
def test_a_rank_that_says_what_cannot_be_understood_is_named(monkeypatch, junk):
    """A rank has proved who it is, so this is a bug or another version; it must not look like one in the
    driver."""
    kept: list[socket.socket] = []

    def started(ranks, rank, kind):
        ours, theirs = socket.socketpair()
        store, their_store = socket.socketpair()
        ranks._channels[rank], ranks._stores[rank] = Channel(ours), Channel(store)
        theirs.sendall(junk)
        kept.extend((theirs, their_store))

    monkeypatch.setattr(launch.Ranks, "_start", started)
    with pytest.raises(RankError, match="rank 1 sent what cannot be understood: "):
        engine_on(2, 1)
    for end in kept:
        end.close()
