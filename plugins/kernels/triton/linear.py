"""x @ weight.T for few rows and small matrices, where cuBLAS pays more for its start than for its bytes. Measured on one H200; cuBLAS
keeps the rest.

1-2 rows      a program takes whole weight rows and sums over their columns, without matrix units
3-256 rows    a program takes 64 rows of x and a tile of weight rows, as many tiles as run at once

Around a product: `gated_linear` applies SiLU and the gate where the product is still in registers; `linear_parts` cuts a long sum
over columns in parts for several programs, which the norm after it adds up.

A program asks for its weights before it waits for x, so that they travel while the kernel before it still runs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .norm import gated, silu_and_mul
from .overlap import fetch, overlap, release, wait

LARGE = 64 << 20  # weight elements up to which one row is better off here than with cuBLAS
SMALL = 8 << 20  # and several rows
ROWS = 64  # of x a program: what Hopper's matrix unit multiplies at once
DEPTH = 128  # columns a step
SHARED = 200_000  # bytes of a multiprocessor's shared memory that tiles under way may take


class RowShape(NamedTuple):
    """Launch shape for one or two rows."""

    rows: int  # of x, a power of two
    tile: int  # weight rows a program
    depth: int  # columns a step
    warps: int


class TileShape(NamedTuple):
    """Launch shape for more rows."""

    tile: int  # output columns a program
    parts: int = 1  # programs that share a tile's columns of x
    warps: int = 4


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
    x_desc, weight_desc, weight_ptr, bias_ptr, out_ptr, M, N, K,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [PARTS, M, N]. GATED: weight has 2 * N rows, gate before up. The descriptors give zeros past x's last row."""
    release(PDL)
    first_row, first_col, part = tl.program_id(0) * ROWS, tl.program_id(1) * TILE, tl.program_id(2)
    columns = K // PARTS
    begin = part * columns
    if PDL and tl.program_id(0) == 0:
        line = tl.arange(0, DEPTH // 64) * 64
        weight = weight_ptr + (first_col + tl.arange(0, TILE)).to(tl.int64)[:, None] * K
        for k in range(begin, begin + columns, DEPTH):
            fetch(weight + (k + line)[None, :])
            if GATED:
                fetch(weight + N.to(tl.int64) * K + (k + line)[None, :])
    wait(PDL)
    acc = tl.zeros([ROWS, TILE], tl.float32)
    up = tl.zeros([ROWS, TILE], tl.float32)
    for k in range(begin, begin + columns, DEPTH):
        x = x_desc.load([first_row, k])
        acc = tl.dot(x, weight_desc.load([first_col, k]).T, acc)
        if GATED:
            up = tl.dot(x, weight_desc.load([N + first_col, k]).T, up)
    row = first_row + tl.arange(0, ROWS)
    col = first_col + tl.arange(0, TILE)
    if BIAS:
        acc += tl.load(bias_ptr + col).to(tl.float32)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if GATED:
        acc = gated(acc.to(dtype), up.to(dtype))
    tl.store(out_ptr + (part * M + row[:, None]) * N + col[None, :], acc.to(dtype), mask=row[:, None] < M)


def _row_shape(rows: int, n: int, k: int) -> RowShape | None:
    if rows == 1 and n * k <= LARGE or rows == 2 and n * k <= SMALL:
        shape = RowShape(rows, 4, 1024, 4)
        return None if n % shape.tile or k % shape.depth else shape
    return None


def tile_shape(rows: int, n: int, k: int, most: int, parts: int = 1) -> TileShape | None:
    """For x [rows, k] and n output columns, in no more than `most` programs and `parts` parts. None: cuBLAS."""
    bands = triton.cdiv(rows, ROWS)
    for tile in (32, 64, 128):
        programs = bands * n // tile
        if (tile == 32 and bands > 1) or n % tile or programs > most:
            continue
        while parts > 1 and (programs * parts > most or k % (parts * DEPTH)):
            parts //= 2
        return None if k % DEPTH else TileShape(tile, parts)
    return None


@cache
def _multiprocessors(device: torch.device) -> int:
    """0 where matrix units have no tiles of the size that the kernel is made for."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fits(x: Tensor, weight: Tensor) -> bool:
    return 2 < len(x) <= 256 and x.element_size() == 2 and x.is_contiguous() and weight.numel() <= SMALL


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, shape: RowShape | TileShape | None = None) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]. A shape that is given is used as it is."""
    rows, k = x.shape
    n = len(weight)
    if shape is None and rows and x.element_size() == 2 and x.is_contiguous():
        shape = _row_shape(rows, n, k) or (tile_shape(rows, n, k, _multiprocessors(x.device)) if _fits(x, weight) else None)
    if shape is None:
        return F.linear(x, weight, bias)
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if isinstance(shape, RowShape):
        _row_kernel[(n // shape.tile,)](
            x, weight, bias, out, rows, n, k, ROWS=shape.rows, TILE=shape.tile, DEPTH=shape.depth, BIAS=bias is not None,
            num_warps=shape.warps, **overlap(x.device),
        )  # fmt: skip
    else:
        _tiles(x, weight, bias, out, shape, False)
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, shape: TileShape | None = None) -> Tensor:
    """x [T, K], weight [2 * N, K] (gate, up) -> silu(gate) * up, [T, N]."""
    n = len(weight) // 2
    if shape is None and _fits(x, weight) and bias is None:
        shape = tile_shape(len(x), n, x.shape[1], _multiprocessors(x.device))
        shape = None if shape and shape.tile > 64 else shape  # two accumulators of 128 columns are too many
    if shape is None:
        return silu_and_mul(linear(x, weight, bias))
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    _tiles(x, weight, None, out, shape, True)
    return out


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None, shape: TileShape | None = None) -> Tensor:
    """As `linear`, or float32 [P, T, N], whose sum over P it is."""
    rows, k = x.shape
    n = len(weight)
    if shape is None and _fits(x, weight) and bias is None:
        shape = tile_shape(rows, n, k, _multiprocessors(x.device), 8)
    if shape is None or shape.parts == 1:
        return linear(x, weight, bias, shape)
    out = torch.empty((shape.parts, rows, n), dtype=torch.float32, device=x.device)
    _tiles(x, weight, None, out, shape, False)
    return out


def _tiles(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, shape: TileShape, gate: bool) -> None:
    rows, k = x.shape
    n = out.shape[-1]
    step = (ROWS + shape.tile * (1 + gate)) * DEPTH * x.element_size()  # bytes
    _tile_kernel[(triton.cdiv(rows, ROWS), n // shape.tile, shape.parts)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH]), TensorDescriptor.from_tensor(weight, [shape.tile, DEPTH]), weight, bias, out,
        rows, n, k, ROWS=ROWS, TILE=shape.tile, DEPTH=DEPTH, PARTS=shape.parts, GATED=gate, BIAS=bias is not None,
        num_warps=shape.warps, num_stages=min(6, SHARED // step), **overlap(x.device),
    )  # fmt: skip
