"""What ranks do together on the device, over memory that their GPUs map into each other: they meet, and sum
parts of a product.

`sum_add_rms_norm` is a sum over the ranks, its addition to the residual stream and the norm behind it, as one
kernel: it tells every peer's kernel that this rank's part is there, waits for theirs, reads all parts and
norms the sum. Against an all-reduce and a norm that saves a second round of waiting, and writing and reading
the sum. With `sum_rows` before it, each rank sums some rows, and the norm reads each row's sum where it is
(two shots).

Torch has such kernels too, but theirs wait for ever when a peer is gone; these stop when they are told.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton.norm import normed, row_shape
from ..kernels.triton.overlap import overlap, release, wait


@triton.jit
def _turn(flag, before: tl.constexpr, after: tl.constexpr, sem: tl.constexpr, stopped_ptr):
    """Waits until a flag is `before`, and makes it `after`; not once the run has failed, which it looks for
    now and then: that word is in the host's memory."""
    stopped = tl.load(stopped_ptr).to(tl.pointer_type(tl.int32))
    tries = 0
    waiting = tl.atomic_cas(flag, before, after, sem=sem, scope="sys") != before
    while waiting:
        tries += 1
        waiting = tl.atomic_cas(flag, before, after, sem=sem, scope="sys") != before
        if tries % 1024 == 0:
            waiting = waiting & (tl.load(stopped, volatile=True) == 0)


@triton.jit
def _meet(flags_ptr, stopped_ptr, place, row, RANKS: tl.constexpr):
    """Tells the program of this row on every peer that it may read, and waits until each of them has said so.
    A flag is set by the one and taken by the other, so it is 0 again when the kernel ends, and a graph may be
    replayed."""
    for peer in tl.static_range(RANKS):
        if peer != place:
            theirs = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int32))
            _turn(theirs + row * RANKS + place, 0, 1, "release", stopped_ptr)
    ours = tl.load(flags_ptr + place).to(tl.pointer_type(tl.int32)) + row * RANKS
    for peer in tl.static_range(RANKS):
        if peer != place:
            _turn(ours + peer, 1, 0, "acquire", stopped_ptr)


@triton.jit
def _part(parts_ptr, rank, dtype: tl.constexpr):
    """Where a rank's part lies. That it lies at a multiple of 16 bytes makes one load of 8 numbers, not 8
    loads."""
    return tl.multiple_of(tl.load(parts_ptr + rank).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _sum_of(parts_ptr, at, mask, dtype: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr):
    """In one order on all ranks, so that their sums are the same to the last bit; rounded as a product that
    one GPU computes."""
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(RANKS):
        total += tl.load(_part(parts_ptr, peer, dtype) + at, mask=mask, other=0.0, cache_modifier=".cg").to(
            tl.float32
        )
    return total.to(dtype)


@triton.jit
def _barrier_kernel(flags_ptr, stopped_ptr, place, RANKS: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    wait(PDL)
    _meet(flags_ptr, stopped_ptr, place, 0, RANKS)


@triton.jit(do_not_specialize=["rows"])
def _sum_rows_kernel(
    parts_ptr,
    flags_ptr,
    stopped_ptr,
    place,
    sums_ptr,
    rows,
    RANKS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * RANKS + place
    col = tl.arange(0, BLOCK)
    mask = col < tl.where(row < rows, N, 0)
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    release(PDL)
    wait(PDL)
    _meet(flags_ptr, stopped_ptr, place, program, RANKS)
    tl.store(
        sums_ptr + row * N + col,
        _sum_of(parts_ptr, row * N + col, mask, dtype, BLOCK, RANKS),
        mask=mask,
    )


@triton.jit
def _sum_add_rms_norm_kernel(
    parts_ptr,
    flags_ptr,
    stopped_ptr,
    place,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    RANKS: tl.constexpr,
    SUMMED: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """SUMMED: what lies at parts_ptr are sums already, row i's with rank i % RANKS."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < N
    at = row * N + col
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    release(PDL)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)[None, :]
    wait(PDL)
    residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    _meet(flags_ptr, stopped_ptr, place, row, RANKS)
    if SUMMED:
        total = tl.load(_part(parts_ptr, row % RANKS, dtype) + at, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        total = _sum_of(parts_ptr, at, mask, dtype, BLOCK, RANKS)
    added = (total.to(tl.float32) + residual).to(dtype)
    tl.store(residual_ptr + at, added, mask=mask)
    out = normed(added.to(tl.float32)[None, :], weight, eps, N, dtype).to(dtype)
    tl.store(out_ptr + row * N + col[None, :], out, mask=mask[None, :])


class Peers:
    """Where the kernels find each other. Every rank launches the same ones in the same order."""

    def __init__(self, place: int, flags: Tensor, stopped: Tensor) -> None:
        """flags int64 [ranks]: the addresses of each rank's flags, int32 [rows, ranks], all 0, with at least
        as many rows as anything that is summed; stopped int32 [1], on the host and page-locked: 0, and
        something else once nobody shall wait any more."""
        self._ranks, self._stopped = len(flags), stopped
        self._met = flags, torch.tensor([stopped.data_ptr()], device=flags.device), place
        self._overlap = overlap(flags.device)

    def barrier(self) -> None:
        """What every rank has written before is there for all."""
        _barrier_kernel[(1,)](*self._met, RANKS=self._ranks, num_warps=1, **self._overlap)

    def sum_rows(self, parts: Tensor, sums: Tensor) -> None:
        """parts int64 [ranks]: where each rank's [rows, N] lies, contiguous, of the type of sums [rows, N],
        which lies in this rank's mapped memory: each rank fills every ranks-th row, beginning with its
        place."""
        rows, n = sums.shape
        if rows:
            block, _, warps = row_shape(n)
            _sum_rows_kernel[(triton.cdiv(rows, self._ranks),)](
                parts,
                *self._met,
                sums,
                rows,
                RANKS=self._ranks,
                N=n,
                BLOCK=block,
                num_warps=warps,
                **self._overlap,
            )

    def sum_add_rms_norm(
        self, parts: Tensor, residual: Tensor, weight: Tensor, eps: float, *, summed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """parts int64 [ranks]: where each rank's part of x lies, contiguous, of the residual's shape and
        type; with `summed`, where its rows of the sum lie that `sum_rows` left. -> (norm(x + residual), x +
        residual), the latter in place. A part may be written again when this rank has passed the next
        call."""
        rows, n = residual.shape
        out = torch.empty_like(residual)
        if rows:
            block, _, warps = row_shape(n)
            _sum_add_rms_norm_kernel[(rows,)](
                parts,
                *self._met,
                residual,
                weight,
                out,
                eps,
                RANKS=self._ranks,
                SUMMED=summed,
                N=n,
                BLOCK=block,
                num_warps=warps,
                **self._overlap,
            )
        return out, residual
