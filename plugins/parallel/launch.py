"""The driver's side: starts the other ranks, or finds those that torchrun started; watches them; says which failed, and why.

The driver is rank 0 and the process that the user started. On one host it starts the rest itself. Under torchrun every rank runs the
same program, and all but rank 0 turn into workers (`worker.py`) as soon as they know the model.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from headway import ConfigError, HeadwayError, RankError

from ..executors.torch.execution import device_of
from ..models.spec import read_model
from . import channel as wire
from .channel import Channel
from .mesh import CollectiveError, Mesh, check_fits

if TYPE_CHECKING:
    from ..executors.torch.batch import StepInput
    from .execution import Job

KEY_BYTES = 32
GRACE = 2.0  # seconds in which a failing rank may still say why
RANK, STORE, KEY = "HEADWAY_RANK", "HEADWAY_STORE", "HEADWAY_KEY"  # what a rank that the driver started is told


@dataclass(frozen=True)
class Failure:
    rank: int
    reason: str
    secondary: bool = False  # it failed because another did


def under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def check(job: Job) -> str:
    """The device type that the ranks run on. Raises ConfigError for what cannot run, before a rank is started or a weight is read."""
    parallel, asked = job.parallel, job.executor["device"]
    if asked.startswith("cuda:"):
        raise ConfigError(f"executor.device={asked}: with {parallel.world_size} ranks each takes its own GPU; set executor.device=cuda or cpu")
    check_fits(read_model(job.model).shape, parallel)
    kind = device_of(asked).type
    if kind == "cuda":
        here = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else parallel.world_size
        if here > (gpus := torch.cuda.device_count()):
            given = f"parallel.tp={parallel.tp} parallel.pp={parallel.pp}"
            raise ConfigError(f"{given} needs {here} GPUs on this host, torch sees {gpus}: lower them, or set executor.device=cpu")
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) != parallel.world_size:
        raise ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, parallel.tp={parallel.tp} parallel.pp={parallel.pp} is "
            f"{parallel.world_size} ranks: start one process a rank"
        )
    return kind


def facts(job: Job) -> dict[str, str]:
    """What must be the same on every host."""
    asked = ("parallel", "model", "engine", "kernels", "seed", "executor")
    return {
        "torch": torch.__version__, "python": "{}.{}".format(*sys.version_info), "shape": repr(read_model(job.model).shape),
        **{name: repr(getattr(job, name)) for name in asked},
    }  # fmt: skip


def rank_device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class Ranks:
    """All ranks but the driver's own, as the driver sees them."""

    def __init__(self, job: Job) -> None:
        """Returns when every rank has been met and agrees on what is to run. Raises ConfigError or RankError."""
        kind = check(job)
        self._job = job
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._channels: dict[int, Channel] = {}
        self._answers: dict[int, queue.SimpleQueue[Any]] = {r: queue.SimpleQueue() for r in range(1, job.parallel.world_size)}
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()  # (tokens, logprobs) of each step, from the last stage
        self._progress = dict.fromkeys(self._answers, (0, 0))  # (steps, collectives) begun
        self._failures: list[Failure] = []
        self._failed = threading.Event()
        self._closing = False
        self.steps = 0
        self._threads = torch.get_num_threads()
        if kind == "cpu":  # the ranks share the cores
            torch.set_num_threads(max(1, self._threads // job.parallel.world_size))
        self.mesh: Mesh
        try:
            store = self._meet(kind)
            with self.blaming():
                self.mesh = Mesh(job.parallel, 0, store, rank_device(kind, int(os.environ.get("LOCAL_RANK", 0)) if under_torchrun() else 0))
        except BaseException:
            self.close()
            raise

    # ---- start ---------------------------------------------------------------------------------------------------

    def _meet(self, kind: str) -> Any:
        """Starts the ranks or waits for torchrun's, and gives each its job. Answers the store at which the mesh meets."""
        world = self._job.parallel.world_size
        key = secrets.token_bytes(KEY_BYTES)
        if under_torchrun():
            store, _, _ = next(dist.rendezvous("env://"))
            host = os.environ["MASTER_ADDR"]
        else:
            host, port = "127.0.0.1", self._job.parallel.port
            try:
                store = dist.TCPStore(host, port, world, is_master=True, wait_for_workers=False)
            except (RuntimeError, OSError):
                raise ConfigError(f"parallel.port={port} cannot be opened, set parallel.port=0 for any free one") from None
        with socket.create_server((host, 0)) as server:
            server.settimeout(0.2)
            store.set("headway/driver", f"{host}:{server.getsockname()[1]}")
            if under_torchrun():
                store.set("headway/key", key)
            else:
                for rank in range(1, world):
                    self._processes[rank] = self._start(rank, f"{host}:{store.port}", key, kind)
            self._greet(server, key, world)
        return store

    def _start(self, rank: int, address: str, key: bytes, kind: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment = os.environ | {RANK: str(rank), STORE: address, KEY: key.hex(), "PYTHONPATH": path}
        if kind == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._job.parallel.world_size)))
        return subprocess.Popen([sys.executable, "-m", f"{__package__}.worker"], env=environment, stdin=subprocess.DEVNULL)

    def _greet(self, server: socket.socket, key: bytes, world: int) -> None:
        ours = facts(self._job)
        waiting = perf_counter() + 120
        while len(self._channels) < world - 1:
            for rank, process in self._processes.items():
                if process.poll() is not None:
                    raise RankError(f"rank {rank} {_ending(process)} before it could be reached")
            if perf_counter() > waiting:
                missing = sorted(set(self._answers) - set(self._channels))
                raise RankError(f"rank {', '.join(map(str, missing))} did not connect within 120 s")
            if (channel := Channel.accept(server, key)) is None:
                continue
            _, body = channel.receive()
            rank, host, theirs = wire.unpack(body)
            self._channels[rank] = channel
            if different := [name for name in theirs if theirs[name] != ours[name]]:
                name = different[0]
                text = (
                    f"rank {rank} on {host} runs with {name} {theirs[name]}, rank 0 with {ours[name]}: "
                    "start every host with the same command and versions"
                )
                for known in self._channels.values():
                    known.send(wire.REFUSED, wire.pack(text))
                raise ConfigError(text)
        for rank, channel in self._channels.items():
            channel.send(wire.CALL, wire.pack(self._job))
            threading.Thread(target=self._listen, args=(rank, channel), daemon=True, name=f"rank {rank}").start()

    # ---- what the driver's Execution calls -----------------------------------------------------------------------

    def call(self, method: str, *args: Any) -> None:
        """Has every rank call a method of its Execution; `answers` collects what they return."""
        self._tell(wire.CALL, wire.pack((method, args)))

    def answers(self) -> list[Any]:
        """One a rank. Waits as long as every rank lives: loading takes what it takes."""
        return [self._take(answers) for answers in self._answers.values()]

    def broadcast(self, step: StepInput) -> None:
        self.steps += 1
        self._tell(wire.STEP, wire.pack_step(step))

    def result(self, limit: float) -> tuple[Any, Any]:
        """(tokens, logprobs) of the oldest step not yet asked for, from the last stage."""
        return self._take(self._results, limit)

    def check(self, limit: float) -> None:
        """Raises RankError when a rank has failed, or when it is later than `limit` (perf_counter)."""
        if self._failed.is_set() or perf_counter() > limit:
            raise self._blame()

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Turns a collective that failed here into the error of the rank at fault."""
        try:
            yield
        except (CollectiveError, OSError) as error:
            raise self._blame() from error

    def _tell(self, kind: bytes, body: bytes) -> None:
        if self._failed.is_set():
            raise self._blame()
        try:
            for channel in self._channels.values():
                channel.send(kind, body)
        except OSError as error:
            raise self._blame() from error

    def _take(self, source: queue.SimpleQueue[Any], limit: float = float("inf")) -> Any:
        while True:
            try:
                return source.get(timeout=0.1)
            except queue.Empty:
                self.check(limit)

    # ---- watching ------------------------------------------------------------------------------------------------

    def _listen(self, rank: int, channel: Channel) -> None:
        """A thread a rank: its answers, results, beats, and the end of its connection, which is the end of the rank."""
        told = False
        try:
            while True:
                kind, body = channel.receive()
                if kind == wire.BEAT:
                    self._progress[rank] = wire.unpack(body)
                elif kind == wire.RESULT:
                    self._results.put(wire.unpack(body))
                elif kind == wire.ANSWER:
                    self._answers[rank].put(wire.unpack(body))
                else:
                    told = True
                    self._fail(Failure(rank, *wire.unpack(body)))
        except (EOFError, OSError):
            if not told and not self._closing:
                process = self._processes.get(rank)
                self._fail(Failure(rank, "lost its connection" if process is None else _ending(process)))

    def _fail(self, failure: Failure) -> None:
        self._failures.append(failure)
        self._failed.set()
        if hasattr(self, "mesh"):
            self.mesh.abort()  # the main thread may be waiting for the device

    def _blame(self) -> HeadwayError:
        """The error of the run: the rank that failed first of itself, or else the one that the others wait for."""
        until = perf_counter() + GRACE
        while not (own := [f for f in self._failures if not f.secondary]) and perf_counter() < until:
            threading.Event().wait(0.05)
        if own:
            error: HeadwayError = RankError(f"rank {own[0].rank} {own[0].reason}")
        else:
            progress = {0: (self.steps, self.mesh.entered if hasattr(self, "mesh") else 0)} | self._progress
            least = min(progress.values())
            behind = [rank for rank, at in progress.items() if at == least]
            names = f"rank {behind[0]} hangs" if len(behind) == 1 else f"ranks {', '.join(map(str, behind))} hang"
            error = RankError(
                f"{names}: at step {least[0]}, collective {least[1]}, while others wait at {max(progress.values())}; "
                f"gave up after parallel.timeout={self._job.parallel.timeout:g} s"
            )
        self.close(failed=True)
        return error

    def close(self, failed: bool = False) -> None:
        """Ends every rank: asks first, kills after `GRACE` seconds. No process that was started here is left."""
        if self._closing:
            return
        self._closing = True
        failed = failed or self._failed.is_set()
        for channel in self._channels.values():
            try:
                channel.send(wire.QUIT)
            except OSError:
                failed = True
        until = perf_counter() + (0 if failed else GRACE)
        torch.set_num_threads(self._threads)
        if hasattr(self, "mesh"):
            # A communicator that waits for a dead rank must not hold up the end of the run.
            closing = threading.Thread(target=self.mesh.close, args=(failed,), daemon=True)
            closing.start()
            closing.join(2 * GRACE)
        for process in self._processes.values():
            try:
                process.wait(max(0.0, until - perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for channel in self._channels.values():
            channel.close()


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(GRACE)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
