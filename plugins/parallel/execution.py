"""The real executor's Execution on one of several ranks: the same steps on a part of the model."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import torch

from headway import ConfigError, EngineConfig, ModelConfig

from ..executors.torch.config import TorchConfig
from ..executors.torch.execution import MEMORY_REMEDY, NO_MEMORY, Execution, Ticket
from ..executors.torch.runner import Sampled
from .config import MeshConfig
from .launch import Ranks, can_map_peers
from .pipeline import Stage, StageBatcher, StageRunner, cut
from .start import end
from .tensor import Sharding, ShardRunner, shard
from .torchrun import under_torchrun

if TYPE_CHECKING:
    from ..executors.torch.batch import StepInput
    from ..kernels.compose import KernelChoice
    from .mesh import Mesh


FIRST_STEPS, COMPILING = 16, 60.0  # a GPU's first steps may compile kernels, and take so many seconds more


@dataclass(frozen=True)
class Job:
    """Everything that a rank must know to be one. Sent to each rank once, as the driver composed it."""

    executor: TorchConfig
    model: ModelConfig
    kernels: KernelChoice | None
    engine: EngineConfig
    seed: int
    parallel: MeshConfig


def drive(job: Job, backends: Callable[[str], KernelChoice] | None) -> DriverExecution:
    """Rank 0's Execution, with all other ranks loaded. On another rank of torchrun's it serves rank 0 and
    then ends the process."""
    if job.parallel.all_reduce == "auto":
        job = replace(
            job, parallel=replace(job.parallel, all_reduce="symmetric" if can_map_peers(job) else "library")
        )
    if under_torchrun() and os.environ["RANK"] != "0":
        from .worker import serve_torchrun

        end(serve_torchrun(job))
    ranks = Ranks(job)
    try:
        with ranks.naming_root_cause():
            return DriverExecution(job, ranks, backends)
    except BaseException:
        ranks.close(failed=True)
        raise


class RankExecution(Execution):
    """On any rank. Every rank is sent the same steps and runs them in the same order."""

    def __init__(self, job: Job, mesh: Mesh, backends: Callable[[str], KernelChoice] | None) -> None:
        self.mesh = mesh
        if job.parallel.pp > 1:
            self.batcher_class = StageBatcher
        runner = StageRunner if job.parallel.pp > 1 else ShardRunner
        self.runner_class = partial(_runner_of, runner, mesh)  # type: ignore[assignment]
        super().__init__(
            replace(job.executor, device=str(mesh.device)),
            job.model,
            job.kernels,
            job.engine,
            backends,
            job.seed,
        )
        if job.parallel.all_reduce == "symmetric" and job.parallel.tp > 1:
            shape, rows = self.spec.shape, max(job.engine.max_num_batched_tokens, job.engine.max_num_seqs)
            mesh.map_peers(
                rows,
                shape.hidden_size,
                getattr(torch, shape.dtype),
                self.kernels.chosen["add_rms_norm"] == "triton",
            )
        timed = job.parallel.pp > 1 and self.config.profile and mesh.device.type == "cuda"
        self.model = Stage(self.model, mesh, timed)  # type: ignore[assignment]

    def _say(self, what: str) -> None:
        if self.mesh.rank == 0:  # the others have the same to say
            super()._say(what)

    def _share(self) -> Sharding:
        cut(self.model, self.mesh)
        return shard(self.model, self.mesh)

    def read_blocks(self, blocks: Sequence[int]) -> list[Any]:
        raise ConfigError(
            "executor=torch hands KV to another engine on one rank: set parallel.tp=1 and parallel.pp=1"
        )

    def write_blocks(self, blocks: Sequence[int], content: list[Any], first: int) -> None:
        raise ConfigError(
            "executor=torch takes KV from another engine on one rank: set parallel.tp=1 and parallel.pp=1"
        )

    def stage_times(self) -> tuple[float, float]:
        """(seconds in which this stage computed, seconds since its first step began), of steps since this was
        last asked. With `executor.profile` on a GPU, in a pipeline, and for steps that are no graph's; (0, 0)
        else."""
        stage: Any = self.model
        times: tuple[float, float] = stage.times()
        return times

    def _go_without_graphs(self) -> None:
        """Not a rank alone: others have their graphs, and would send and sum padded steps."""
        raise ConfigError(
            f"rank {self.mesh.rank}: {NO_MEMORY}, which all ranks have or none: {MEMORY_REMEDY}"
        )

    def linger(self) -> None:
        """At once in a pipeline, whose stages work on several steps."""
        if self.mesh.parallel.pp == 1:
            super().linger()

    def switch(self, long_steps: str, transport: str) -> None:
        """For measurements, between two runs: how steps communicate from now on. long_steps: "split" or
        "whole"; transport: "library", or "symmetric" where all_reduce is. Graphs are captured again."""
        self.mesh.long_steps, self.mesh.transport = long_steps, transport
        self._prepare_steps()


def _runner_of(kind: type[ShardRunner], mesh: Mesh, *args: Any, **options: Any) -> ShardRunner:
    runner = kind(*args, **options)
    runner.mesh = mesh
    return runner


class DriverExecution(RankExecution):
    """On rank 0, which schedules for all."""

    def __init__(self, job: Job, ranks: Ranks, backends: Callable[[str], KernelChoice] | None) -> None:
        self.ranks = ranks
        super().__init__(job, ranks.mesh, backends)
        self._say(
            f"ranks: tp={job.parallel.tp} pp={job.parallel.pp}, parallel.all_reduce={job.parallel.all_reduce}"
        )
        ranks.answers()  # every rank has loaded its part
        atexit.register(self.close)

    def kv_capacity(self, block_size: int) -> int:
        self.ranks.call("kv_capacity", block_size)
        with self.ranks.naming_root_cause():
            own = super().kv_capacity(block_size)
        fewest: int = min(own, *self.ranks.answers())
        return fewest

    def start(self, *args: Any) -> None:
        self.ranks.call("start", *args)
        with self.ranks.naming_root_cause():
            super().start(*args)
        self.ranks.answers()

    def all_stage_times(self) -> list[tuple[float, float]]:
        self.ranks.call("stage_times")
        return [super().stage_times(), *self.ranks.answers()]

    def switch(self, long_steps: str, transport: str) -> None:
        self.ranks.call("switch", long_steps, transport)
        super().switch(long_steps, transport)
        self.ranks.answers()

    def _execute(self, step: StepInput) -> Sampled:
        with self.ranks.naming_root_cause():
            self.ranks.broadcast(step)
            return super()._execute(step)

    def _send_back(self, ticket: Ticket, sampled: Sampled) -> None:
        if self.mesh.is_last:
            super()._send_back(ticket, sampled)

    def _wait(self, ticket: Ticket) -> None:
        compiling = COMPILING if self._arrived and self.ranks.steps <= FIRST_STEPS else 0.0
        limit = perf_counter() + self.mesh.parallel.timeout + compiling
        if not self.mesh.is_last:
            tokens, logprobs = self.ranks.result(limit)
            self._results[ticket.slot][: ticket.step.num_samples] = torch.from_numpy(tokens)
            ticket.logprobs = logprobs
        elif self._arrived:
            # Not `synchronize`: that would wait for ever when a rank is gone.
            while not self._arrived[ticket.slot].query():
                self.ranks.check(limit)
                sleep(0)

    def close(self) -> None:
        atexit.unregister(self.close)
        super().close()  # before the communicators that its graphs hold
        self.ranks.close()
