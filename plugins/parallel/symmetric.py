"""Products and sums over memory that the GPUs of a host map into each other (torch's symmetric memory), instead of NCCL's.

Short steps: the product before an all-reduce is written straight into such memory and summed there in two shots: each rank adds up its
part of every peer's buffer, then fetches the other parts. At the sizes of a decode step NCCL is bound by latency and this is not.

Long steps: the sum's two halves are taken apart (sequence parallelism: Korthikanti et al. 2022, section 4.2.2), and each runs beside
the product next to it, a part of the rows for each rank (Wang et al. 2023, "Overlap communication with dependent computation via
decomposition"). Copy engines carry the parts, which leaves all SMs to the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway import ConfigError


class SymmetricReduce:
    """Two buffers in turn, so that a result lives until the next but one all-reduce: a layer's two never meet."""

    def __init__(self, group: Any, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for [rows, columns]. Every rank of `group` calls this at once."""
        self._columns, self._group, self._next = columns, group.group_name, 0
        self._buffers, self._handles = zip(*(_mapped(group, rows * columns, dtype, device) for _ in range(2)), strict=True)
        dist.barrier(group=group)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K], weight [N, K] -> the sum of x @ weight.T over the ranks, [T, N]. Valid until the next call but one."""
        buffer = self._buffers[self._next]
        self._next ^= 1
        flat = buffer[: len(x) * self._columns]
        product = flat.view(len(x), self._columns)
        torch.mm(x, weight.t(), out=product)
        torch.ops.symm_mem.two_shot_all_reduce_(flat, "sum", self._group)
        return product


class OverlappedProducts:
    """A long step's products, each beside the communication next to it.

    Each rank's rows lie in memory that its peers read (`outgoing`); what it is sent lies in memory that they write (`incoming`).
    Every product has one barrier, and products that gather and products that reduce take turns. That is all the order there must
    be: a peer that has passed the barrier of the one kind is done with what the other kind left in its memory and in ours.
    """

    def __init__(self, group: Any, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for [rows, columns] of each rank. Every rank of `group` calls this at once."""
        self._size, self._ranks = rows * columns, dist.get_world_size(group)
        buffer, self._handle = _mapped(group, (1 + self._ranks) * self._size, dtype, device)
        self._place = self._handle.rank
        self._memory = [self._handle.get_buffer(rank, (len(buffer),), dtype) for rank in range(self._ranks)]
        # The peers, each rank's in another order: no two read from, or write to, one rank at once.
        self._peers = [(self._place + step) % self._ranks for step in range(1, self._ranks)]
        self._copies, self._side = torch.cuda.Stream(device), torch.cuda.Stream(device)
        dist.barrier(group=group)

    def gathered_linear(self, product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [S, K] of each rank -> product(rows, weight, bias) of all ranks' rows, [ranks * S, N]. Ours are multiplied while the
        others' arrive. A product with an activation in it may answer fewer columns than `weight` has rows, never more."""
        here, side, copies = torch.cuda.current_stream(), self._side, self._copies
        self._outgoing(self._place, x.shape).copy_(x)
        self._handle.barrier()  # every rank's rows are there
        side.wait_stream(here)
        copies.wait_stream(here)
        everything = x.new_empty(self._ranks, *x.shape)
        # Taken before a product runs: memory that one has used and given back in this stream is not free yet for the other.
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
        """x [T, K], weight [N, K] of each rank -> rows [place * rows, place * rows + rows) of the sum of x @ weight.T over the ranks,
        [rows, N]; what lies behind T is arbitrary. Others' rows are multiplied first, and leave while the next are multiplied."""
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
        self._handle.barrier()  # every rank's parts have arrived
        first = self._incoming(self._place, 0, shape)
        return first.as_strided((self._ranks, *shape), (self._size, shape[1], 1)).sum(0)

    def _outgoing(self, rank: int, shape: Sequence[int]) -> Tensor:
        return self._slot(rank, self._ranks, shape)

    def _incoming(self, rank: int, sender: int, shape: Sequence[int]) -> Tensor:
        return self._slot(rank, sender, shape)

    def _slot(self, rank: int, number: int, shape: Sequence[int]) -> Tensor:
        first = number * self._size
        return self._memory[rank][first : first + shape[0] * shape[1]].view(*shape)


def _mapped(group: Any, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Any]:
    """(`size` elements that every rank of `group` maps, the handle to the others'). Every rank calls this at once.
    Raises ConfigError where GPUs cannot map each other's memory."""
    import torch.distributed._symmetric_memory as symmetric

    try:
        buffer = symmetric.empty(size, dtype=dtype, device=device)
        return buffer, symmetric.rendezvous(buffer, group.group_name)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"parallel.all_reduce=symmetric: {device} cannot map its peers' memory ({reason}); set it to library") from error
