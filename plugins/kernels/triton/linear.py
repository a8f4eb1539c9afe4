"""x @ weight.T for few rows and small matrices, where cuBLAS pays more for its start than for its bytes.
Measured on one H200; cuBLAS keeps the rest.

1-2 rows      a program takes whole weight rows and sums over their columns, without matrix units
3-256 rows    a program takes 64 rows of x and a tile of weight rows, as many tiles as run at once

Around a product: `gated_linear` applies SiLU and the gate where the product is still in registers;
`linear_parts` cuts a long sum over columns in parts for several programs, which the norm after it adds up.

A program asks for its weights before it waits for x, so that they travel while the kernel before it still
runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import is_hopper, multiprocessors
from .norm import gated, silu_and_mul
from .overlap import fetch, overlap, release, wait

LARGE = 64 << 20  # weight elements up to which one row is better off here than with cuBLAS
SMALL = 8 << 20  # and several rows
ROW_TILE, ROW_DEPTH = 4, 1024  # for one or two rows: weight rows a program, columns a step
ROWS = 64  # for more, of x a program: what Hopper's matrix unit multiplies at once
DEPTH = 128  # columns a step
SHARED = 200_000  # bytes of a multiprocessor's shared memory that tiles under way may take


class TileShape(NamedTuple):
    """Launch shape for more than two rows."""

    tile: int  # output columns a program
    parts: int = 1  # programs that share a tile's columns of x


@triton.jit(do_not_specialize=["M"])
def _row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
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
        x = tl.load(x_ptr + of_x[:, None] * K + (k + lane)[None, :], mask=of_x[:, None] < M, other=0.0).to(
            tl.float32
        )
        acc += w[None, :, :] * x[:, None, :]
    out = tl.sum(acc, axis=2)
    if BIAS:
        out += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    tl.store(
        out_ptr + of_x[:, None] * N + row[None, :], out.to(out_ptr.dtype.element_ty), mask=of_x[:, None] < M
    )


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x_desc,
    weight_desc,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [PARTS, M, N]. GATED: weight has 2 * N rows, gate before up. The descriptors give zeros past x's
    last row."""
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


def tile_shape(rows: int, n: int, k: int, most: int, parts: int = 1) -> TileShape | None:
    """For x [rows, k] and n output columns, in no more than `most` programs and `parts` parts. None:
    cuBLAS."""
    bands = triton.cdiv(rows, ROWS)
    for tile in (32, 64, 128):
        programs = bands * n // tile
        if (tile == 32 and bands > 1) or n % tile or programs > most:
            continue
        while parts > 1 and (programs * parts > most or k % (parts * DEPTH)):
            parts //= 2
        return None if k % DEPTH else TileShape(tile, parts)
    return None


def _readable(x: Tensor) -> bool:
    return x.element_size() == 2 and x.is_contiguous()


def _takes_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel for one or two rows is the fastest."""
    n, k = weight.shape
    most = {1: LARGE, 2: SMALL}.get(len(x), 0)
    return 0 < n * k <= most and not n % ROW_TILE and not k % ROW_DEPTH and _readable(x)


def _shape(x: Tensor, weight: Tensor, n: int, parts: int = 1) -> TileShape | None:
    """`tile_shape` where the kernel can run and may be the fastest: Hopper's matrix units multiply what its
    tiles are made for."""
    if not 2 < len(x) <= 256 or weight.numel() > SMALL or not _readable(x) or not is_hopper(x.device):
        return None
    return tile_shape(len(x), n, x.shape[1], multiprocessors(x.device), parts)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, shape: TileShape | None = None) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]. A shape that is given is used as it is."""
    if shape is None and _takes_rows(x, weight):
        return _rows(x, weight, bias)
    shape = shape or _shape(x, weight, len(weight))
    if shape is None:
        return F.linear(x, weight, bias)
    out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    _tiles(x, weight, bias, out, shape, False)
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, shape: TileShape | None = None) -> Tensor:
    """x [T, K], weight [2 * N, K] (gate, up) -> silu(gate) * up, [T, N]."""
    n = len(weight) // 2
    if shape is None and bias is None:
        shape = _shape(x, weight, n)
        shape = None if shape and shape.tile > 64 else shape  # two accumulators of 128 columns are too many
    if shape is None:
        return silu_and_mul(linear(x, weight, bias))
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    _tiles(x, weight, None, out, shape, True)
    return out


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None, shape: TileShape | None = None) -> Tensor:
    """As `linear`, or float32 [P, T, N], whose sum over P it is."""
    n = len(weight)
    if shape is None and bias is None:
        shape = _shape(x, weight, n, 8)
    if shape is None or shape.parts == 1:
        return linear(x, weight, bias, shape)
    out = torch.empty((shape.parts, len(x), n), dtype=torch.float32, device=x.device)
    _tiles(x, weight, None, out, shape, False)
    return out


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, (n, k) = len(x), weight.shape
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    _row_kernel[(n // ROW_TILE,)](
        x,
        weight,
        bias,
        out,
        rows,
        n,
        k,
        ROWS=rows,
        TILE=ROW_TILE,
        DEPTH=ROW_DEPTH,
        BIAS=bias is not None,
        num_warps=4,
        **overlap(x.device),
    )
    return out


def _tiles(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, shape: TileShape, gate: bool) -> None:
    rows, k = x.shape
    n = out.shape[-1]
    step = (ROWS + shape.tile * (1 + gate)) * DEPTH * x.element_size()  # bytes
    _tile_kernel[(triton.cdiv(rows, ROWS), n // shape.tile, shape.parts)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(weight, [shape.tile, DEPTH]),
        weight,
        bias,
        out,
        rows,
        n,
        k,
        ROWS=ROWS,
        TILE=shape.tile,
        DEPTH=DEPTH,
        PARTS=shape.parts,
        GATED=gate,
        BIAS=bias is not None,
        num_warps=4,
        num_stages=min(6, SHARED // step),
        **overlap(x.device),
    )
