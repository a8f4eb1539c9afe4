"""Products and sums over memory that the GPUs of a host map into each other (torch's symmetric memory),
instead of NCCL's.

Short steps: the product before an all-reduce is written straight into such memory, where the kernel of the
norm behind it reads and sums all ranks' parts (`peers.py`). At the sizes of a decode step NCCL is bound by
latency and this is not.

Long steps: the sum's two halves are taken apart (sequence parallelism: Korthikanti et al. 2022, section
4.2.2), and each runs beside the product next to it, a part of the rows for each rank (Wang et al. 2023,
"Overlap communication with dependent computation via decomposition"). Copy engines carry the parts, which
leaves all SMs to the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway import ConfigError

if TYPE_CHECKING:
    from .peers import Peers

#: Above two ranks, the largest part in bytes that is summed in one shot: every rank reads all parts, where
#: two shots read and write 2/ranks of them. vLLM's custom all-reduce (csrc/custom_all_reduce.cuh) draws the
#: line at 512 KiB for four GPUs and at 256 KiB for eight; two always take one shot.
ONE_SHOT = 256 << 10

Norm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class Meeting:
    """Flags in mapped memory at which the ranks' kernels wait for each other, until `stop`."""

    def __init__(self, group: Any, rows: int, device: torch.device) -> None:
        """For sums of at most so many rows. Every rank of `group` calls this at once."""
        from .peers import Peers

        self._flags, self._handle = _mapped(group, rows * dist.get_world_size(group), torch.int32, device)
        self._flags.zero_()
        # On the host, where a thread can write it whatever the device is doing and the main thread is waiting
        # for.
        self._stopped = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.peers = Peers(self._handle.rank, addresses(self._handle, device), self._stopped)
        torch.cuda.synchronize(device)
        dist.barrier(group=group)

    def stop(self) -> None:
        """From any thread: nobody waits any more for a rank that will not come. What is summed from now on is
        of no meaning."""
        self._stopped[0] = 1


class SymmetricReduce:
    """Products whose parts lie in mapped memory, in two buffers in turn, so that a result lives until the
    next but one: a layer's two never meet. `product` leaves a part; `summed`, or `add_norm` with a norm in
    the same kernel, ends what it began."""

    def __init__(
        self,
        group: Any,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        peers: Peers,
        fused_norm: bool,
    ) -> None:
        """Room for [rows, columns]. fused_norm: whether Triton's norm is the one that comes next. Every rank
        of `group` calls this at once."""
        self._peers, self._fused_norm, self._next = peers, fused_norm, 0
        self._buffers, self._handles = zip(
            *(_mapped(group, rows * columns, dtype, device) for _ in range(3)), strict=True
        )
        self._addresses = [addresses(handle, device) for handle in self._handles]
        self._ranks, self._columns = dist.get_world_size(group), columns
        dist.barrier(group=group)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K], weight [N, K] -> this rank's part of x @ weight.T, [T, N]."""
        product = self._room(self._next, len(x))
        self._next ^= 1
        return torch.mm(x, weight.t(), out=product)

    def summed(self, part: Tensor) -> Tensor:
        """The last product's sum over the ranks, [T, N]."""
        self._peers.barrier()
        handle, size = self._handles[self._next ^ 1], part.shape
        parts = [handle.get_buffer(rank, size, part.dtype).float() for rank in range(self._ranks)]
        total: Tensor = sum(parts[1:], parts[0])
        return total.to(part.dtype)

    def add_norm(
        self, norm: Norm, part: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`norm` of the last product's sum and the residual stream, and their sum, [T, N] each."""
        if not self._fused_norm:
            return norm(self.summed(part), residual, weight, eps)
        parts, sums = self._addresses[self._next ^ 1], self._addresses[2]
        if self._ranks == 2 or part.nbytes <= ONE_SHOT:
            return self._peers.sum_add_rms_norm(parts, residual, weight, eps)
        self._peers.sum_rows(parts, self._room(2, len(part)))
        return self._peers.sum_add_rms_norm(sums, residual, weight, eps, summed=True)

    def _room(self, buffer: int, rows: int) -> Tensor:
        room: Tensor = self._buffers[buffer][: rows * self._columns].view(rows, self._columns)
        return room


def addresses(handle: Any, device: torch.device) -> Tensor:
    """int64 [ranks]: where this process finds each rank's part of mapped memory."""
    return torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)


class OverlappedProducts:
    """A long step's products, each beside the communication next to it.

    Each rank's rows lie in memory that its peers read (`outgoing`); what it is sent lies in memory that they
    write (`incoming`). Every product has one barrier, and products that gather and products that reduce take
    turns. That is all the order there must be: a peer that has passed the barrier of the one kind is done
    with what the other kind left in its memory and in ours.
    """

    def __init__(
        self,
        group: Any,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        barrier: Callable[[], None],
    ) -> None:
        """Room for [rows, columns] of each rank; barrier: what every rank has written before is there for
        all. Every rank of `group` calls this at once."""
        self._barrier = barrier
        self._size, self._ranks = rows * columns, dist.get_world_size(group)
        buffer, self._handle = _mapped(group, (1 + self._ranks) * self._size, dtype, device)
        self._place = self._handle.rank
        self._memory = [self._handle.get_buffer(rank, (len(buffer),), dtype) for rank in range(self._ranks)]
        # The peers, each rank's in another order: no two read from, or write to, one rank at once.
        self._peers = [(self._place + step) % self._ranks for step in range(1, self._ranks)]
        self._copies, self._side = torch.cuda.Stream(device), torch.cuda.Stream(device)
        dist.barrier(group=group)

    def gathered_linear(
        self, product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """x [S, K] of each rank -> product(rows, weight, bias) of all ranks' rows, [ranks * S, N]. Ours are
        multiplied while the others' arrive. A product with an activation in it may answer fewer columns than
        `weight` has rows, never more."""
        here, side, copies = torch.cuda.current_stream(), self._side, self._copies
        self._outgoing(self._place, x.shape).copy_(x)
        self._barrier()  # every rank's rows are there
        side.wait_stream(here)
        copies.wait_stream(here)
        everything = x.new_empty(self._ranks, *x.shape)
        # Taken before a product runs: memory that one has used and given back in this stream is not free yet
        # for the other.
        room = x.new_empty(self._ranks * len(x) * len(weight))
        arrived = []
        with torch.cuda.stream(copies):
            for peer in self._peers:
                everything[peer].copy_(self._outgoing(peer, x.shape))
                arrived.append(copies.record_event())
        ours = product(x, weight, bias)
        found = room[: self._ranks * ours.numel()].view(self._ranks, *ours.shape)
        found[self._place].copy_(ours)
        # In two streams, so that the last tiles of a product share the SMs with the first of the next.
        for number, (peer, event) in enumerate(zip(self._peers, arrived, strict=True)):
            stream = here if number % 2 else side
            stream.wait_event(event)
            with torch.cuda.stream(stream):
                found[peer].copy_(product(everything[peer], weight, bias))
        here.wait_stream(side)
        here.wait_stream(copies)
        return found.flatten(0, 1)

    def reduced_linear(self, x: Tensor, weight: Tensor, rows: int) -> Tensor:
        """x [T, K], weight [N, K] of each rank -> rows [place * rows, place * rows + rows) of the sum of x @
        weight.T over the ranks, [rows, N]; what lies behind T is arbitrary. Others' rows are multiplied
        first, and leave while the next are multiplied."""
        here, side, copies = torch.cuda.current_stream(), self._side, self._copies
        side.wait_stream(here)
        shape = rows, len(weight)
        products = x.new_empty(self._ranks - 1, *shape)
        for number, peer in enumerate((*self._peers, self._place)):
            part = x[peer * rows : (peer + 1) * rows]
            product = self._incoming(peer, peer, shape) if peer == self._place else products[number]
            stream = side if number % 2 else here
            with torch.cuda.stream(stream):
                torch.mm(part, weight.t(), out=product[: len(part)])
            if peer != self._place:
                copies.wait_stream(stream)
                with torch.cuda.stream(copies):
                    self._incoming(peer, self._place, shape).copy_(product)
        here.wait_stream(side)
        here.wait_stream(copies)
        self._barrier()  # every rank's parts have arrived
        first = self._incoming(self._place, 0, shape)
        return first.as_strided((self._ranks, *shape), (self._size, shape[1], 1)).sum(0)

    def _outgoing(self, rank: int, shape: Sequence[int]) -> Tensor:
        return self._slot(rank, self._ranks, shape)

    def _incoming(self, rank: int, sender: int, shape: Sequence[int]) -> Tensor:
        return self._slot(rank, sender, shape)

    def _slot(self, rank: int, number: int, shape: Sequence[int]) -> Tensor:
        first = number * self._size
        slot: Tensor = self._memory[rank][first : first + shape[0] * shape[1]].view(*shape)
        return slot


def _mapped(group: Any, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Any]:
    """(`size` elements that every rank of `group` maps, the handle to the others'). Every rank calls this at
    once. Raises ConfigError where GPUs cannot map each other's memory."""
    import torch.distributed._symmetric_memory as symmetric

    try:
        buffer = symmetric.empty(size, dtype=dtype, device=device)
        return buffer, symmetric.rendezvous(buffer, group.group_name)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"parallel.all_reduce=symmetric: {device} cannot map its peers' memory ({reason}); set it to "
            "library"
        ) from error
