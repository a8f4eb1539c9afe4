"""Who this rank is, and how it talks to the ranks beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from headway import ConfigError, HeadwayError, ModelShape, ParallelConfig

from .config import MeshConfig
from .symmetric import Meeting, Norm, OverlappedProducts, SymmetricReduce

# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
STARTUP = 600.0  # seconds that ranks may be apart while kernels compile and graphs are captured


class CollectiveError(HeadwayError):
    """A collective failed or ran out of time. Another rank is the cause: `launch.py` finds out which."""


class Mesh:
    """Ranks in a torch DeviceMesh (pp, tp): rank = stage * tp + place in the stage. Rank 0 is the driver."""

    def __init__(self, parallel: MeshConfig, rank: int, store: Any, device: torch.device) -> None:
        """Meets the other ranks at `store`. Raises CollectiveError when one does not come."""
        if dist.is_initialized():
            raise ConfigError(
                "another run on several ranks is open in this process: close it first (LLM.close(), "
                "executor.close())"
            )
        self.parallel, self.rank, self.device = parallel, rank, device
        self._store = store  # C++ keeps no hold of a Store in Python, and asks it again when memory is mapped
        self.stage, self.place = divmod(rank, parallel.tp)
        self._closing = Lock()
        # collectives begun: of ranks that wait for each other, the one at fault has begun the fewest
        self.entered = 0
        on_gpu = device.type == "cuda"
        # the driver decides when a run has failed and ends it; NCCL's watchdog would end this process first
        if on_gpu:
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            # Nor does a thread of NCCL's ask the store every second whether anybody wants a dump.
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        # Captured collectives are no business of NCCL's own watchdog, so the driver's clock ends a step that
        # hangs on a GPU.
        limit = timedelta(seconds=STARTUP if on_gpu else parallel.timeout)
        self._guarded(
            dist.init_process_group,
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=parallel.world_size,
            timeout=limit,
        )
        try:
            self._connect()
        except BaseException:
            self.close(failed=True)
            raise

    def _connect(self) -> None:
        parallel, device = self.parallel, self.device
        mesh = init_device_mesh(device.type, (parallel.pp, parallel.tp), mesh_dim_names=("pp", "tp"))
        self.tp_group, self.pp_group = mesh.get_group("tp"), mesh.get_group("pp")
        # How long steps communicate, "split" over the ranks or "whole" as short ones do, and through what:
        # only measurements change these.
        self.long_steps, self.transport = "split", parallel.all_reduce
        self._tokens = 0  # of the step that is running, when its residual stream is split over the ranks
        self._peers: tuple[SymmetricReduce, OverlappedProducts] | None = None  # see map_peers
        self._meeting: Meeting | None = None
        self._unsummed: Tensor | None = None  # this rank's part of a product, in mapped memory
        self._sending: Any = None  # the last send, not known to be over; and what it sends
        # NCCL makes communicators at their first use: now, while nothing else is under way.
        self.all_reduce(torch.zeros(1, device=device))
        if not self.is_first:
            self.receive(torch.zeros(1, device=device))
        if not self.is_last:
            self.send(torch.zeros(1, device=device))
            self.flush()

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.parallel.pp - 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of this stage, in place."""
        if self.parallel.tp > 1:
            self._guarded(dist.all_reduce, x, group=self.tp_group)
        return x

    # ---- a step's tokens, whole on every rank or split over the ranks of a stage --------------------------

    def begin(self, tokens: int) -> int:
        """A step of so many tokens begins. Answers how many rows of the residual stream a rank holds: all, or
        of a long step its part, the last ones padded."""
        is_long = self.parallel.tp > 1 and 0 < self.parallel.overlap_tokens <= tokens
        self._tokens = tokens if is_long and self.long_steps == "split" else 0
        return self._part if self._tokens else tokens

    @property
    def _part(self) -> int:
        """Rows of each rank in a long step."""
        return -(-self._tokens // self.parallel.tp)

    def reduced(self, x: Tensor) -> Tensor:
        """x [T, N] of each rank -> the sum over the ranks: [T, N], or of a long step this rank's rows, [part,
        N]."""
        if not self._tokens:
            return self.all_reduce(x)
        tp, rows = self.parallel.tp, self._part
        if missing := tp * rows - len(x):
            x = F.pad(x, (0, 0, 0, missing))
        if self.device.type == "cpu":  # gloo has no reduce-scatter in every version
            return self.all_reduce(x)[self.place * rows : (self.place + 1) * rows]
        ours = x.new_empty(rows, x.shape[1])
        self._guarded(_reduce_scatter, ours, x, group=self.tp_group)
        return ours

    def gathered(self, x: Tensor) -> Tensor:
        """This rank's rows, [part, N] in a long step -> all of them, [T, N]."""
        if not self._tokens:
            return x
        everything = x.new_empty(self.parallel.tp * len(x), x.shape[1])
        self._guarded(_all_gather, everything, x.contiguous(), group=self.tp_group)
        return everything[: self._tokens]

    def gathered_linear(
        self, product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """product(x, weight, bias) of the rows of all ranks, [T, N]. What it does to a row does not depend on
        others."""
        if not self._tokens or self._peers is None or self.transport == "library":
            return product(self.gathered(x), weight, bias)
        self.entered += 1
        return self._peers[1].gathered_linear(product, x, weight, bias)[: self._tokens]

    def reduced_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K], weight [N, K] of this rank -> what `reduced` makes of x @ weight.T."""
        if self._peers is None or self.transport == "library":
            return self.reduced(F.linear(x, weight))
        self.entered += 1
        symmetric, overlapped = self._peers
        if self._tokens:
            return overlapped.reduced_linear(x, weight, self._part)
        return symmetric.summed(symmetric.product(x, weight))

    def partial_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """As `reduced_linear`, or this rank's part of the sum: `add_norm` or `whole` comes next and sums
        it."""
        if self._peers is None or self._tokens or self.transport == "library":
            return self.reduced_linear(x, weight)
        self._unsummed = self._peers[0].product(x, weight)
        return self._unsummed

    def add_norm(
        self, norm: Norm, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """norm(x, residual, weight, eps), of what `partial_linear` or anything else returned."""
        if x is not self._unsummed or self._peers is None:
            return norm(x, residual, weight, eps)
        self.entered += 1
        self._unsummed = None
        return self._peers[0].add_norm(norm, x, residual, weight, eps)

    def whole(self, x: Tensor) -> Tensor:
        """x, or its sum over the ranks if it is what `partial_linear` left."""
        if x is not self._unsummed or self._peers is None:
            return x
        self.entered += 1
        self._unsummed = None
        return self._peers[0].summed(x)

    def map_peers(self, rows: int, columns: int, dtype: torch.dtype, fused_norm: bool) -> None:
        """From now on layers communicate through memory that the GPUs of a stage map into each other, for
        sums of at most [rows, columns]; fused_norm: see SymmetricReduce. Every rank of a stage calls this at
        once. Raises ConfigError where GPUs cannot."""
        group, device = self.tp_group, self.device
        self._meeting = Meeting(group, rows, device)
        peers, part = self._meeting.peers, -(-rows // self.parallel.tp)
        self._peers = (
            SymmetricReduce(group, rows, columns, dtype, device=device, peers=peers, fused_norm=fused_norm),
            OverlappedProducts(group, part, columns, dtype, device=device, barrier=peers.barrier),
        )

    def all_gather(self, x: Tensor) -> Tensor:
        """x [R, C] of every rank of this stage, side by side: [R, tp * C]."""
        if self.parallel.tp == 1:
            return x
        parts = x.new_empty(self.parallel.tp * len(x), x.shape[1])
        self._guarded(_all_gather, parts, x.contiguous(), group=self.tp_group)
        return parts.view(self.parallel.tp, *x.shape).movedim(0, 1).reshape(len(x), -1)

    def best(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """The tokens int64 [S] with the highest of the ranks' scores float32 [S]; of equal ones the first
        rank's."""
        # exact below 2^53
        both = self.all_gather(torch.stack((scores.double(), tokens.double()), dim=1)).view(
            len(tokens), -1, 2
        )
        return both[..., 1].gather(1, both[..., 0].argmax(1, keepdim=True)).squeeze(1).long()

    def send(self, x: Tensor) -> None:
        """To the same place in the next stage. The stage goes on with its next step while that one is still
        busy; in a CUDA graph it cannot."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._guarded(dist.send, x, self.rank + self.parallel.tp, group=self.pp_group)
            return
        self.flush()
        self._sending = self._guarded(dist.isend, x, self.rank + self.parallel.tp, group=self.pp_group), x

    def flush(self) -> None:
        """What was sent last has left before anything that follows begins."""
        if self._sending is not None:
            self._guarded(self._sending[0].wait)
            self._sending = None

    def receive(self, x: Tensor) -> Tensor:
        """Into x, from the same place in the stage before."""
        self._guarded(dist.recv, x, self.rank - self.parallel.tp, group=self.pp_group)
        return x

    def _guarded(self, collective: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.entered += 1
        try:
            return collective(*args, **options)
        except (RuntimeError, ValueError) as error:  # ValueError: the groups were aborted a moment ago
            raise CollectiveError(
                f"rank {self.rank}: {getattr(collective, '__name__', 'collective')}: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def abort(self) -> None:
        """From any thread: ends collectives on a GPU that wait for a rank which will not come. On a CPU they
        end by themselves."""
        with self._closing:
            if self._meeting is not None:
                self._meeting.stop()
            if self.device.type == "cuda" and dist.is_initialized():
                dist.distributed_c10d._abort_process_group()

    def close(self, failed: bool = False) -> None:
        """Gives ports and communicators back; after a failure without waiting for ranks that may be gone."""
        if failed:
            self.abort()
        with self._closing:
            if dist.is_initialized():
                dist.destroy_process_group()


def check_fits(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Raises ConfigError where a model cannot be split as asked. Looks at numbers alone: no weights, no ranks
    yet."""
    tp, pp = parallel.tp, parallel.pp
    heads, kv_heads, inner, layers = (
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.intermediate_size,
        shape.num_hidden_layers,
    )
    if heads % tp:
        raise ConfigError(
            f"parallel.tp={tp} does not divide the model's {heads} attention heads: {_divisors('tp', heads)}"
        )
    if kv_heads % tp and tp % kv_heads:
        raise ConfigError(
            f"parallel.tp={tp} neither divides the model's {kv_heads} KV heads nor is a multiple of them: "
            f"{_divisors('tp', kv_heads)}"
        )
    if inner % tp:
        raise ConfigError(
            f"parallel.tp={tp} does not divide intermediate_size={inner}: {_divisors('tp', inner)}"
        )
    if pp > layers:
        raise ConfigError(f"parallel.pp={pp}: the model has only {layers} layers, and each stage needs one")
    if parallel.layers is not None and (
        len(parallel.layers) != pp or sum(parallel.layers) != layers or min(parallel.layers) < 1
    ):
        raise ConfigError(
            f"parallel.layers={list(parallel.layers)}: expected {pp} numbers of at least 1, one a stage, "
            f"that add up to {layers} layers"
        )


def _divisors(axis: str, number: int) -> str:
    return (
        f"set parallel.{axis} to one of "
        f"{', '.join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)}"
    )
