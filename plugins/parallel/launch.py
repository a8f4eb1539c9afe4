"""The driver's side: starts the other ranks, or finds those that torchrun started; watches them; says which
failed, and why.

The driver is rank 0 and the process that the user started. On one host it starts the rest itself
(`start.py`), with sockets that they inherit. Under torchrun every rank runs the same program, and all but
rank 0 turn into workers (`worker.py`) as soon as they know the model; they connect to the driver
(`torchrun.py`, `handshake.py`).
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from headway import ConfigError, HeadwayError, RankError

from ..executors.torch.execution import device_of
from ..models.spec import read_model
from . import channel as wire
from . import messages, torchrun
from .channel import Channel, Malformed
from .handshake import Door
from .mesh import CollectiveError, Mesh, check_fits
from .start import SIGNALS
from .store import Shelf, Store, serve
from .torchrun import under_torchrun

if TYPE_CHECKING:
    from ..executors.torch.batch import StepInput
    from .execution import Job

GRACE = 2.0  # seconds in which a failing rank may still say why
LEAVING = 20.0  # seconds that communicators may take to let go of ranks that may be gone
TICK = 0.5  # seconds between two looks at who has said nothing
QUIET = 2.0  # seconds of silence, four beats, of a rank that others wait for: it is stopped
#: Seconds on top of parallel.timeout in which a rank may say nothing: imports, and on a GPU contexts and
#: compilers, can keep Python from running its beat.
SILENCE = {"cpu": 5.0, "cuda": 60.0}
#: Seconds on top of parallel.timeout in which torchrun's ranks come, when all are on one host, and when not.
LAGGING = {True: 5.0, False: 60.0}


@dataclass(frozen=True)
class Failure:
    rank: int
    reason: str
    secondary: bool = False  # it failed because another did


def check(job: Job) -> str:
    """The device type that the ranks run on. Raises ConfigError for what cannot run, before a rank is started
    or a weight is read."""
    parallel, asked = job.parallel, job.executor.device
    if asked.startswith("cuda:"):
        raise ConfigError(
            f"executor.device={asked}: with {parallel.world_size} ranks each takes its own GPU; set "
            "executor.device=cuda or cpu"
        )
    check_fits(read_model(job.model).shape, parallel)
    kind = device_of(asked).type
    if kind == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if under_torchrun() else parallel.world_size
        if here > (gpus := torch.cuda.device_count()):
            given = f"parallel.tp={parallel.tp} parallel.pp={parallel.pp}"
            raise ConfigError(
                f"{given} needs {here} GPUs on this host, torch sees {gpus}: lower them, or set "
                "executor.device=cpu"
            )
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) != parallel.world_size:
        raise ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, parallel.tp={parallel.tp} "
            f"parallel.pp={parallel.pp} is "
            f"{parallel.world_size} ranks: start one process a rank"
        )
    return kind


def can_map_peers(job: Job) -> bool:
    """Whether all ranks are GPUs of one host that can read each other's memory. Raises ConfigError as `check`
    does."""
    on_gpus, parallel = check(job) == "cuda", job.parallel
    if not on_gpus or parallel.tp == 1 or (under_torchrun() and not torchrun.on_one_host()):
        return False
    return all(
        torch.cuda.can_device_access_peer(*pair) for pair in permutations(range(parallel.world_size), 2)
    )


def facts(job: Job) -> dict[str, str]:
    """What must be the same on every host."""
    asked = ("parallel", "model", "engine", "kernels", "seed", "executor")
    return {
        "torch": torch.__version__,
        "python": "{}.{}".format(*sys.version_info),
        "shape": repr(read_model(job.model).shape),
        **{name: repr(getattr(job, name)) for name in asked},
    }


def rank_device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def order_of(job: Job) -> messages.Order:
    """What is sent of a job. Raises ConfigError for kernels that are no dataclass of plain values."""
    kernels = None
    if (chosen := job.kernels) is not None:
        parameters = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen) if f.init}
        kernels = messages.Registered(chosen.plugin_name, made_by(chosen), parameters)
    return messages.Order(job.executor, job.model, kernels, job.engine, job.seed, job.parallel)


def store_of(order: messages.Order, otherwise: Any) -> Any:
    """Where ranks leave the addresses of their collectives for each other."""
    if order.store_file:
        return dist.FileStore(order.store_file, order.parallel.world_size)  # type: ignore[attr-defined]  # torch exports it at run time
    return otherwise


def made_by(kernels: Any) -> str:
    return f"{type(kernels).__module__}.{type(kernels).__qualname__}"


class Ranks:
    """All ranks but the driver's own, as the driver sees them."""

    def __init__(self, job: Job) -> None:
        """Returns when every rank has been met and agrees on what is to run. Raises ConfigError or
        RankError."""
        kind = check(job)
        self._job = job
        self._file: Path | None = None  # of a store in a file
        order = dataclasses.replace(order_of(job), store_file=self._store_file())
        packed = messages.pack(order)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._channels: dict[int, Channel] = {}
        self._shelf = Shelf()
        self._stores: dict[int, Channel] = {}  # each rank's connection to the shelf
        self._answers: dict[int, queue.SimpleQueue[Any]] = {
            r: queue.SimpleQueue() for r in range(1, job.parallel.world_size)
        }
        # (tokens, logprobs) of each step, from the last stage
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._progress = dict.fromkeys(self._answers, (0, 0))  # (steps, collectives) begun
        self._silent = dict.fromkeys(self._answers, 0.0)  # seconds since a rank last said anything
        self._failures: list[Failure] = []
        self._failed = threading.Event()
        self._closing = False
        self._closed = threading.Event()
        self._leaving: threading.Thread | None = None  # closes the mesh
        self.steps = 0
        self._threads = torch.get_num_threads()
        if kind == "cpu":  # the ranks share the cores
            torch.set_num_threads(max(1, self._threads // job.parallel.world_size))
        self.mesh: Mesh
        atexit.register(self.close)
        try:
            if under_torchrun():
                self._meet()
            else:
                torchrun.keep_to_loopback()
                for rank in self._answers:
                    self._start(rank, kind)
            self._give(packed, kind)
            self.answers()  # every rank has imported what it needs, so parallel.timeout can hold from here on
            with self.naming_root_cause():
                local_rank = int(os.environ.get("LOCAL_RANK", 0)) if under_torchrun() else 0
                device = rank_device(kind, local_rank)
                self.mesh = Mesh(job.parallel, 0, store_of(order, Store(self._shelf.ask)), device)
        except BaseException:
            self.close()
            raise

    # ---- start --------------------------------------------------------------------------------------------

    def _store_file(self) -> str:
        """GPUs that map each other's memory wait for each other with Python's lock held, and then this
        process cannot serve a store. They are on one host, so a file does."""
        if self._job.parallel.all_reduce != "symmetric" or self._job.parallel.tp == 1:
            return ""
        if under_torchrun() and torchrun.meeting_point() != torchrun.LOOPBACK:
            raise ConfigError(
                "parallel.all_reduce=symmetric: it runs on one host, this run is on several: set it to "
                "library"
            )
        self._file = torchrun.private_file()
        return str(self._file)

    def _start(self, rank: int, kind: str) -> None:
        """On this host. The rank inherits its ends of two pairs of sockets."""
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment = os.environ | {"PYTHONPATH": path}
        if kind == "cpu":
            environment.setdefault(
                "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._job.parallel.world_size))
            )
        (ours, theirs), (our_store, their_store) = socket.socketpair(), socket.socketpair()
        self._channels[rank], self._stores[rank] = Channel(ours), Channel(our_store)
        ends = (theirs.fileno(), their_store.fileno())
        command = [sys.executable, "-m", f"{__package__}.start", *map(str, (rank, *ends, os.getpid()))]
        # A rank leaves signals to us from its first instruction on.
        with theirs, their_store, signals_blocked():
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=ends)
            self._processes[rank] = process

    def _meet(self) -> None:
        """torchrun's ranks come to us. Raises RankError when one does not, ConfigError when its job is
        another."""
        ours = facts(self._job)
        if torchrun.meeting_point() == torchrun.LOOPBACK:
            torchrun.keep_to_loopback()
        patience = self._job.parallel.timeout + LAGGING[torchrun.on_one_host()]
        with torchrun.shared_key() as (key, told):
            door = Door(torchrun.open_door(self._job.parallel.port), key)
            try:
                store = torchrun.announce(door.port, told)
                until = perf_counter() + patience
                while missing := [rank for rank in self._answers if not self._has_come(rank)]:
                    try:
                        hello, channel = door.met.get(timeout=max(0.0, until - perf_counter()))
                    except queue.Empty:
                        raise RankError(_absent(missing, patience, door.strangers)) from None
                    self._know(hello, channel, ours)
            finally:
                door.close()
        del store

    def _has_come(self, rank: int) -> bool:
        return rank in self._channels and rank in self._stores

    def _know(self, hello: messages.Hello, channel: Channel, ours: dict[str, str]) -> None:
        name = f"rank {hello.rank} on {messages.readable(hello.host)}"
        known = {"orders": self._channels, "store": self._stores}.get(hello.purpose)
        if known is None or hello.rank not in self._answers or hello.rank in known:
            channel.close()
            last = len(self._answers)
            wrong = f"{name} connects twice, or is none of ranks 1 to {last}"
            raise RankError(f"{wrong}: start one process per rank")
        known[hello.rank] = channel
        if not self._has_come(hello.rank):
            return
        theirs = hello.facts
        if different := [fact for fact in ours if theirs.get(fact) != ours[fact]]:
            fact = different[0]
            runs = f"{name} runs with {fact} {theirs.get(fact)}, rank 0 with {ours[fact]}"
            text = messages.readable(f"{runs}: start every host with the same command and versions")
            for other in self._channels.values():
                other.send(wire.REFUSED, messages.pack(messages.Refused(text)))
            raise ConfigError(text)

    def _give(self, order: bytes, kind: str) -> None:
        """Its job to every rank; from now on it is listened to and watched."""
        patience = self._job.parallel.timeout + SILENCE[kind]
        for rank in self._channels:
            threading.Thread(target=self._listen, args=(rank, self._channels[rank]), daemon=True).start()
            threading.Thread(target=self._serve, args=(rank, self._stores[rank]), daemon=True).start()
        threading.Thread(target=self._watch, args=(patience,), daemon=True).start()
        self._tell(wire.JOB, order)

    # ---- what the driver's Execution calls ----------------------------------------------------------------

    def call(self, method: str, *args: int | str) -> None:
        """Has every rank call a method of its Execution; `answers` collects what they return."""
        self._tell(wire.CALL, messages.pack(messages.Call(method, list(args))))

    def answers(self) -> list[Any]:
        """One a rank. Waits as long as every rank lives: loading takes what it takes."""
        return [self._take(answers) for answers in self._answers.values()]

    def broadcast(self, step: StepInput) -> None:
        self.steps += 1
        self._tell(wire.STEP, messages.pack_step(step))

    def result(self, limit: float) -> tuple[Any, Any]:
        """(tokens, logprobs) of the oldest step not yet asked for, from the last stage."""
        result: tuple[Any, Any] = self._take(self._results, limit)
        return result

    def check(self, limit: float) -> None:
        """Raises RankError when a rank has failed, or when it is later than `limit` (perf_counter)."""
        if self._failed.is_set() or perf_counter() > limit:
            raise self._root_cause()

    @contextmanager
    def naming_root_cause(self) -> Iterator[None]:
        """Turns a collective that failed here into the error of the rank at fault."""
        try:
            yield
        except (CollectiveError, OSError) as error:
            raise self._root_cause() from error

    def _tell(self, kind: bytes, body: bytes) -> None:
        if self._failed.is_set():
            raise self._root_cause()
        try:
            for channel in self._channels.values():
                channel.send(kind, body)
        except OSError as error:
            raise self._root_cause() from error

    def _take(self, source: queue.SimpleQueue[Any], limit: float = float("inf")) -> Any:
        while True:
            try:
                return source.get(timeout=0.1)
            except queue.Empty:
                self.check(limit)

    # ---- watching -----------------------------------------------------------------------------------------

    def _listen(self, rank: int, channel: Channel) -> None:
        """A thread a rank: its answers, results, beats, and the end of its connection, which is the end of
        the rank."""
        told = False
        try:
            while True:
                kind, body = channel.receive()
                self._silent[rank] = 0.0
                if kind == wire.BEAT:
                    self._progress[rank] = messages.unpack_beat(body)
                elif kind == wire.RESULT:
                    self._results.put(messages.unpack_result(body))
                elif kind == wire.ANSWER:
                    self._answers[rank].put(messages.unpack(messages.Answer, body).value)
                elif kind == wire.RAISED:
                    told = True
                    raised = messages.unpack(messages.Raised, body)
                    self._fail(Failure(rank, messages.readable(raised.reason), raised.secondary))
                else:
                    raise Malformed(f"a message of kind {kind!r}, which is no rank's to send")
        except Malformed as error:
            self._fail(Failure(rank, f"sent what cannot be understood: {error}"))
        except (EOFError, OSError):
            if not told and not self._closing:
                process = self._processes.get(rank)
                self._fail(Failure(rank, "lost its connection" if process is None else _ending(process)))

    def _serve(self, rank: int, channel: Channel) -> None:
        try:
            serve(channel, self._shelf)
        except ValueError as error:
            self._fail(Failure(rank, f"sent what cannot be understood: {error}"))

    def _watch(self, patience: float) -> None:
        """A rank that is stopped says nothing, not even that it lives. Counts our own looks, so that a
        driver which was stopped itself blames nobody."""
        timeout = f"parallel.timeout={self._job.parallel.timeout:g}"
        reason = f"hangs: not a sign of life for {patience:g} s ({timeout})"
        while not self._closed.wait(TICK):
            for rank in self._silent:
                self._silent[rank] += TICK
                if self._silent[rank] > patience and not self._failed.is_set():
                    self._fail(Failure(rank, reason))
                    if process := self._processes.get(rank):
                        process.kill()  # others may wait for it in a collective

    def _fail(self, failure: Failure) -> None:
        self._failures.append(failure)
        self._failed.set()
        self._shelf.close()
        if hasattr(self, "mesh"):
            self.mesh.abort()  # the main thread may be waiting for the device

    def _root_cause(self) -> HeadwayError:
        """The error of the run: the rank that failed first of itself, or else the one that the others wait
        for."""
        until = perf_counter() + GRACE
        while not (own := [f for f in self._failures if not f.secondary]) and perf_counter() < until:
            threading.Event().wait(0.05)
        error = RankError(f"rank {own[0].rank} {own[0].reason}" if own else self._waited_for())
        self._end(failed=True)
        return error

    def _waited_for(self) -> str:
        """Of ranks that wait for each other: those that say nothing, else those with the fewest
        collectives."""
        gave_up = f"gave up after parallel.timeout={self._job.parallel.timeout:g} s"
        if quiet := [rank for rank, seconds in self._silent.items() if seconds > QUIET]:
            return f"{_hanging(quiet)}: not even a sign of life; {gave_up}"
        progress = {0: (self.steps, self.mesh.entered if hasattr(self, "mesh") else 0)} | self._progress
        least = min(progress.values())
        behind = [rank for rank, at in progress.items() if at == least]
        at = f"at step {least[0]}, collective {least[1]}, while others wait at {max(progress.values())}"
        return f"{_hanging(behind)}: {at}; {gave_up}"

    def close(self, failed: bool = False) -> None:
        """Ends every rank, and waits for the communicators to let go. NCCL's wait in their turn for the CUDA
        graphs that captured them, so those are given back before."""
        self._end(failed)
        # Nor may the interpreter end while a thread is inside them: C++ would end the process with SIGABRT.
        if self._leaving is not None:
            self._leaving.join(LEAVING)

    def _end(self, failed: bool = False) -> None:
        """Ends every rank: asks first, kills after `GRACE` seconds, at once if the run has failed. No process
        that was started here is left. Communicators begin to let go, in a thread: one that waits for a dead
        rank must not hold up the word of it."""
        if self._closing:
            return
        self._closing = True
        self._closed.set()
        atexit.unregister(self.close)
        failed = failed or self._failed.is_set()
        for channel in self._channels.values():
            try:
                channel.send(wire.QUIT)
            except OSError:
                failed = True
        until = perf_counter() + (0 if failed else GRACE)
        torch.set_num_threads(self._threads)
        if hasattr(self, "mesh"):
            self._leaving = threading.Thread(target=self.mesh.close, args=(failed,), daemon=True)
            self._leaving.start()
            if not failed:
                self._leaving.join(2 * GRACE)  # the ranks take part in it
        for process in self._processes.values():
            try:
                process.wait(max(0.0, until - perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._shelf.close()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        for channel in [*self._channels.values(), *self._stores.values()]:
            channel.close()


def _hanging(ranks: list[int]) -> str:
    return f"rank {ranks[0]} hangs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} hang"


def _absent(ranks: list[int], seconds: float, strangers: int) -> str:
    names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    text = f"{names} did not connect within {seconds:g} s (parallel.timeout and the time to start)"
    if strangers:
        text += f"; {strangers} connections did not prove the key: is {torchrun.KEY} the same on every host?"
    return text


@contextmanager
def signals_blocked() -> Iterator[None]:
    """A process that is started meanwhile has them blocked too. The driver gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(GRACE)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
