"""Every rank but the driver's: takes its job, loads its part of the model, runs the steps that it is sent.

A worker never outlives the driver: its Pulse (`start.py`) ends it, whatever it is doing.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from headway import ConfigError, load_registry

from ..executors.torch.execution import device_of
from . import channel as wire
from . import messages, torchrun
from .channel import Channel, Malformed
from .execution import Job, RankExecution
from .launch import LAGGING, check, facts, made_by, rank_device, store_of
from .mesh import CollectiveError, Mesh
from .start import Pulse, leave_signals_to_the_driver, report_error
from .store import over

if TYPE_CHECKING:
    from ..executors.torch.runner import Sampled

#: What a CALL may name.
CALLS: dict[str, Callable[..., Any]] = {
    "kv_capacity": RankExecution.kv_capacity,
    "start": RankExecution.start,
    "stage_times": RankExecution.stage_times,
    "switch": RankExecution.switch,
}


class Worker:
    def __init__(self, rank: int, local_rank: int, orders: Channel, store: Channel, pulse: Pulse) -> None:
        self.rank, self._local_rank = rank, local_rank
        self.channel, self._store, self._pulse = orders, over(store), pulse
        self.steps = 0
        self.mesh: Mesh | None = None
        self._outbox: queue.SimpleQueue[tuple[Any, Sampled]] = queue.SimpleQueue()
        pulse.progress = lambda: (self.steps, self.mesh.entered if self.mesh else 0)

    def serve(self) -> int:
        """The exit code: 0 when the driver said that it is over."""
        try:
            kind, body = self.channel.receive()
            if kind == wire.REFUSED:
                raise ConfigError(messages.readable(messages.unpack(messages.Refused, body).reason))
            if kind == wire.JOB:  # else it is over before it began
                self._run(messages.unpack(messages.Order, body))
        except (EOFError, OSError):
            return 1  # the driver is gone
        except BaseException as error:
            report_error(self.channel, self.rank, error, isinstance(error, CollectiveError))
            return 1
        if self.mesh is not None:
            self.mesh.close()
        return 0

    def _run(self, order: messages.Order) -> None:
        registry = load_registry()
        job = job_of(order, registry)
        self._answer(None)
        device = rank_device(device_of(job.executor.device).type, self._local_rank)
        self.mesh = Mesh(job.parallel, self.rank, store_of(order, self._store), device)
        execution = RankExecution(job, self.mesh, lambda name: registry.get("kernels", name).build())
        self._answer(None)
        reports = job.parallel.pp > 1 and self.mesh.is_last and self.mesh.place == 0
        if reports:
            threading.Thread(target=self._post, daemon=True).start()
        while True:
            kind, body = self.channel.receive()
            if kind == wire.STEP:
                self.steps += 1
                sampled = execution.runner.execute(messages.unpack_step(body))
                if reports:
                    self._send_back(sampled)
            elif kind == wire.CALL:
                call = messages.unpack(messages.Call, body)
                if call.method not in CALLS:
                    raise Malformed(f"a call of {call.method!r}: expected one of {', '.join(CALLS)}")
                self._answer(CALLS[call.method](execution, *call.args))
            elif kind == wire.QUIT:
                execution.close()
                return
            else:
                raise Malformed(f"a message of kind {kind!r}, which is no driver's to send")

    def _answer(self, value: Any) -> None:
        self.channel.send(wire.ANSWER, messages.pack(messages.Answer(value)))

    # ---- threads ------------------------------------------------------------------------------------------

    def _send_back(self, sampled: Sampled) -> None:
        """What was sampled, to the driver, as soon as the device has it; the next step does not wait for
        that."""
        on_host = sampled._replace(
            tokens=sampled.tokens.to("cpu", non_blocking=True),
            logprobs=None
            if sampled.logprobs is None
            else tuple(part.to("cpu", non_blocking=True) for part in sampled.logprobs),
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
                self.channel.send(wire.RESULT, messages.pack_result(sampled.tokens.numpy(), logprobs))
            except OSError:
                return


def job_of(order: messages.Order, registry: Any) -> Job:
    """The driver's Job. Raises ConfigError when its kernels are not those that are known here by their
    name."""
    kernels = None
    if (sent := order.kernels) is not None:
        plugin = registry.get("kernels", sent.name)
        try:
            kernels = plugin.build(**sent.parameters)
        except TypeError:  # another class, with other parameters
            kernels = plugin.build()
        if made_by(kernels) != sent.made_by:
            ours = f"kernels={sent.name} is {sent.made_by} where the run was composed, and {made_by(kernels)}"
            remedy = "ranks build kernels from the registry, so register that class under its own name"
            raise ConfigError(f"{ours} by its registered name: {remedy}")
    return Job(order.executor, order.model, kernels, order.engine, order.seed, order.parallel)


def serve_torchrun(job: Job) -> int:
    """A rank that torchrun started: serves the run that rank 0 drives. Raises ConfigError as rank 0 does for
    what cannot run."""
    check(job)
    rank = int(os.environ["RANK"])
    if torchrun.meeting_point() == torchrun.LOOPBACK:
        torchrun.keep_to_loopback()
    orders, store = torchrun.join(rank, facts(job), job.parallel.timeout + LAGGING[torchrun.on_one_host()])
    leave_signals_to_the_driver()
    return Worker(rank, int(os.environ.get("LOCAL_RANK", 0)), orders, store, Pulse(orders)).serve()
