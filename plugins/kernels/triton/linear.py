"""x @ weight.T for few rows: a step of decodes reads every weight once, and for up to 64 rows that read is all that counts.

A program takes BLOCK_N rows of the weight. Before it waits for x it asks for its weights, so that they travel while the kernel before
it still runs. Where the weight has too few rows to occupy the GPU, several programs share a tile's columns, and the last to arrive
adds their parts in a fixed order. More rows than that are a matrix product like any other: cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .overlap import overlap, release, wait


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Launch shape."""

    rows: int  # of x, padded: rows of a product
    tile: int  # weight rows
    depth: int  # columns a step
    split: int  # programs that share a tile's columns
    warps: int
    stages: int


@triton.jit
def _fetch(pointers):
    """Asks for the cache lines that hold these addresses, without waiting for them."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, M, N, K, x_stride,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.arange(0, ROWS)
    col = tl.program_id(0) * TILE + tl.arange(0, TILE)
    share = K // SPLIT
    begin = tl.program_id(1) * share
    weight = weight_ptr + col.to(tl.int64)[:, None] * K
    if PDL:
        line = tl.arange(0, DEPTH // 64) * 64  # 128 bytes of half precision
        for k in range(begin, begin + share, DEPTH):
            _fetch(weight + (k + line)[None, :])
    wait(PDL)
    lane = tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, TILE], tl.float32)
    for k in range(begin, begin + share, DEPTH):
        w = tl.load(weight + (k + lane)[None, :])
        x = tl.load(x_ptr + row[:, None] * x_stride + (k + lane)[None, :], mask=row[:, None] < M, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    at = row[:, None] * N + col[None, :]
    mask = row[:, None] < M
    if SPLIT == 1:
        if BIAS:
            acc += tl.load(bias_ptr + col).to(tl.float32)[None, :]
        tl.store(out_ptr + at, acc.to(dtype), mask=mask)
    else:
        tl.store(partial_ptr + tl.program_id(1) * M * N + at, acc, mask=mask)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        arrived = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            tl.store(arrived_ptr + tl.program_id(0), 0)
            total = tl.zeros([ROWS, TILE], tl.float32)
            for part in tl.static_range(SPLIT):
                total += tl.load(partial_ptr + part * M * N + at, mask=mask, other=0.0, cache_modifier=".cg")
            if BIAS:
                total += tl.load(bias_ptr + col).to(tl.float32)[None, :]
            tl.store(out_ptr + at, total.to(dtype), mask=mask)


@cache
def _arrivals(device: torch.device) -> Tensor:
    """int32, zero between kernels."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


def linear_shape(rows: int, n: int, k: int) -> LinearShape | None:
    """None: cuBLAS is better."""
    if rows > 64:
        return None
    padded = max(16, triton.next_power_of_2(rows))
    return LinearShape(padded, 32, 256 if padded < 64 else 128, 1, 4, 4)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, shape: LinearShape | None = None) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]."""
    rows, k = x.shape
    n = weight.shape[0]
    shape = shape or linear_shape(rows, n, k)
    if shape is None or x.element_size() != 2 or n % shape.tile or k % (shape.split * shape.depth) or x.stride(1) != 1 or not rows:
        return F.linear(x, weight, bias)
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    partial = torch.empty((shape.split, rows, n), dtype=torch.float32, device=x.device) if shape.split > 1 else out
    _linear_kernel[(n // shape.tile, shape.split)](
        x, weight, bias, out, partial, _arrivals(x.device), rows, n, k, x.stride(0),
        ROWS=shape.rows, TILE=shape.tile, DEPTH=shape.depth, SPLIT=shape.split, BIAS=bias is not None,
        num_warps=shape.warps, num_stages=shape.stages, **overlap(x.device),
    )  # fmt: skip
    return out
