"""x @ weight.T for few rows, where reading the weight is all that counts. Measured on one H200 against cuBLAS, which keeps the rest:

1-4 rows     a program takes whole weight rows and sums over their columns, without matrix units
5-64 rows    a program takes a tile of weight rows; small matrices only, where cuBLAS pays more for its start than for its bytes

A program asks for its weights before it waits for x, so that they travel while the kernel before it still runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .overlap import fetch, overlap, release, wait

LARGE = 64 << 20  # weight elements up to which one row is better off here than with cuBLAS
SMALL = 8 << 20  # and several rows


class RowShape(NamedTuple):
    """Launch shape for up to 4 rows."""

    rows: int  # of x, a power of two
    tile: int  # weight rows a program
    depth: int  # columns a step
    warps: int


class TileShape(NamedTuple):
    """Launch shape for more rows."""

    rows: int  # of x a program
    tile: int  # weight rows a program
    depth: int  # columns a step
    warps: int
    stages: int


@triton.jit(do_not_specialize=["M"])
def _row_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M, N, K,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    of_x = tl.arange(0, ROWS)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    weight = weight_ptr + row.to(tl.int64)[:, None] * K
    lane = tl.arange(0, DEPTH)
    if PDL:
        line = tl.arange(0, DEPTH // 64) * 64  # 128 bytes of half precision
        for k in range(0, tl.minimum(K, 2 * DEPTH), DEPTH):
            fetch(weight + (k + line)[None, :])
    wait(PDL)
    acc = tl.zeros([ROWS, TILE, DEPTH], tl.float32)
    for k in range(0, K, DEPTH):
        w = tl.load(weight + (k + lane)[None, :], eviction_policy="evict_first").to(tl.float32)
        x = tl.load(x_ptr + of_x[:, None] * K + (k + lane)[None, :], mask=of_x[:, None] < M, other=0.0).to(tl.float32)
        acc += w[None, :, :] * x[:, None, :]
    out = tl.sum(acc, axis=2)
    if BIAS:
        out += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    tl.store(out_ptr + of_x[:, None] * N + row[None, :], out.to(out_ptr.dtype.element_ty), mask=of_x[:, None] < M)


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M, N, K, x_stride,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) * TILE + tl.arange(0, TILE)
    weight = weight_ptr + col.to(tl.int64)[:, None] * K
    lane = tl.arange(0, DEPTH)
    if PDL:
        line = tl.arange(0, DEPTH // 64) * 64
        for k in range(0, K, DEPTH):
            fetch(weight + (k + line)[None, :])
    wait(PDL)
    acc = tl.zeros([ROWS, TILE], tl.float32)
    for k in range(0, K, DEPTH):
        w = tl.load(weight + (k + lane)[None, :])
        x = tl.load(x_ptr + row[:, None] * x_stride + (k + lane)[None, :], mask=row[:, None] < M, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc)
    if BIAS:
        acc += tl.load(bias_ptr + col).to(tl.float32)[None, :]
    tl.store(out_ptr + row[:, None] * N + col[None, :], acc.to(out_ptr.dtype.element_ty), mask=row[:, None] < M)


def linear_shape(rows: int, n: int, k: int) -> RowShape | TileShape | None:
    """None: cuBLAS."""
    shape: RowShape | TileShape | None = None
    padded = max(16, triton.next_power_of_2(rows))
    if rows == 1 and n * k <= LARGE or rows <= 4 and n * k <= SMALL:
        shape = RowShape(triton.next_power_of_2(rows), 4 if rows <= 2 else 2, 1024, 4)
    elif rows <= 64 and n * k <= SMALL and k <= (3 if padded == 16 else 2) * n:
        if padded == 64 and n >= 6144:
            shape = TileShape(padded, 64, 128, 4, 4)
        else:
            shape = TileShape(padded, 32 if n >= 2048 or padded == 16 else 16, 256, 4, 4)
    return None if shape is None or n % shape.tile or k % shape.depth else shape


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, shape: RowShape | TileShape | None = None) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]. A shape that is given is used as it is."""
    rows, k = x.shape
    n = weight.shape[0]
    shape = shape or linear_shape(rows, n, k)
    if shape is None or not rows or x.element_size() != 2 or not x.is_contiguous():
        return F.linear(x, weight, bias)
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    grid, options = (n // shape.tile,), {"BIAS": bias is not None, "num_warps": shape.warps, **overlap(x.device)}
    if isinstance(shape, RowShape):
        _row_kernel[grid](x, weight, bias, out, rows, n, k, ROWS=shape.rows, TILE=shape.tile, DEPTH=shape.depth, **options)
    else:
        grid += (triton.cdiv(rows, shape.rows),)
        _tile_kernel[grid](
            x, weight, bias, out, rows, n, k, x.stride(0), ROWS=shape.rows, TILE=shape.tile, DEPTH=shape.depth, num_stages=shape.stages, **options
        )
    return out
