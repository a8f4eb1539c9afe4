"""Every rank but the driver's: takes its job, loads its part of the model, runs the steps that it is sent until the driver ends.

A worker never outlives the driver: when its connection closes, it is gone within BEAT_SECONDS, whatever it is doing.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from headway import ConfigError, HeadwayError, load_registry

from ..executors.torch.execution import device_of
from . import channel as wire
from .channel import Channel
from .execution import Job, RankExecution
from .launch import KEY, RANK, STORE, check, facts, rank_device
from .mesh import CollectiveError, Mesh

if TYPE_CHECKING:
    from ..executors.torch.runner import Sampled

BEAT_SECONDS = 0.5


class Worker:
    def __init__(self, rank: int, local_rank: int, store: Any, key: bytes, known: dict[str, str]) -> None:
        """known: facts of the run as this rank composed it, {} when the driver started it."""
        self.rank, self._local_rank, self._store = rank, local_rank, store
        host, _, port = store.get("headway/driver").decode().rpartition(":")
        self.channel = Channel.connect(host, int(port), key)
        self.channel.send(wire.HELLO, wire.pack((rank, socket.gethostname(), known)))
        self.steps = 0
        self.mesh: Mesh | None = None
        self._outbox: queue.SimpleQueue[tuple[Any, Sampled]] = queue.SimpleQueue()

    def serve(self) -> int:
        """The exit code: 0 when the driver said that it is over."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, who tells us
        try:
            kind, body = self.channel.receive()
            if kind == wire.REFUSED:
                raise ConfigError(wire.unpack(body))
            self._run(wire.unpack(body))
        except (EOFError, OSError):
            return 1  # the driver is gone
        except BaseException as error:
            self._confess(error)
            return 1
        if self.mesh is not None:
            self.mesh.close()
        return 0

    def _run(self, job: Job) -> None:
        threading.Thread(target=self._beat, daemon=True).start()
        device = rank_device(device_of(job.executor["device"]).type, self._local_rank)
        self.mesh = Mesh(job.parallel, self.rank, self._store, device)
        registry = load_registry()
        execution = RankExecution(job, self.mesh, lambda name: registry.get("kernels", name).build())
        self._answer(None)
        reports = job.parallel.pp > 1 and self.mesh.is_last and self.mesh.place == 0
        if reports:
            threading.Thread(target=self._post, daemon=True).start()
        while True:
            kind, body = self.channel.receive()
            if kind == wire.STEP:
                self.steps += 1
                sampled = execution.runner.execute(wire.unpack_step(body))
                if reports:
                    self._send_back(sampled)
            elif kind == wire.CALL:
                method, args = wire.unpack(body)
                self._answer(getattr(execution, method)(*args))
            else:
                execution.close()
                return

    def _answer(self, thing: Any) -> None:
        self.channel.send(wire.ANSWER, wire.pack(thing))

    # ---- threads -------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Tells how far we are, which is how a rank that hangs is found. A closed connection ends the process."""
        while True:
            try:
                self.channel.send(wire.BEAT, wire.pack((self.steps, self.mesh.entered if self.mesh else 0)))
            except OSError:
                os._exit(1)
            threading.Event().wait(BEAT_SECONDS)

    def _send_back(self, sampled: Sampled) -> None:
        """What was sampled, to the driver, as soon as the device has it; the next step does not wait for that."""
        on_host = sampled._replace(
            tokens=sampled.tokens.to("cpu", non_blocking=True),
            logprobs=None if sampled.logprobs is None else tuple(part.to("cpu", non_blocking=True) for part in sampled.logprobs),
        )
        arrived: Callable[[], None] = lambda: None  # noqa: E731
        if sampled.tokens.is_cuda:
            event = torch.cuda.Event()
            event.record()
            arrived = event.synchronize
        self._outbox.put((arrived, on_host))

    def _post(self) -> None:
        while True:
            arrived, sampled = self._outbox.get()
            arrived()
            logprobs = None if sampled.logprobs is None else tuple(part.numpy() for part in sampled.logprobs)
            try:
                self.channel.send(wire.RESULT, wire.pack((sampled.tokens.numpy(), logprobs)))
            except OSError:
                return

    def _confess(self, error: BaseException) -> None:
        secondary = isinstance(error, CollectiveError)
        text = str(error) if isinstance(error, HeadwayError) else f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        try:
            self.channel.send(wire.RAISED, wire.pack((f"raised {text}", secondary)))
        except OSError:
            print(f"rank {self.rank}: {text}", file=sys.stderr)


def serve_torchrun(job: Job) -> int:
    """A rank that torchrun started: serves the run that rank 0 drives. Raises ConfigError as rank 0 does for what cannot run."""
    check(job)
    store, rank, _ = next(dist.rendezvous("env://"))
    return Worker(rank, int(os.environ["LOCAL_RANK"]), store, store.get("headway/key"), facts(job)).serve()


def main() -> int:
    host, _, port = os.environ[STORE].rpartition(":")
    store = dist.TCPStore(host, int(port), is_master=False)
    rank = int(os.environ[RANK])
    return Worker(rank, rank, store, bytes.fromhex(os.environ[KEY]), {}).serve()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a communicator or a CUDA context that waits for a dead rank must not keep the process
