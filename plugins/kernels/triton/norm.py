"""RMSNorm with and without residual, and SiLU-and-mul: one pass over memory each. Arithmetic in float32, one
rounding a stored value (the normed value is rounded before the weight multiplies it, as the reference and
transformers do)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import overlap, release, wait


@triton.jit
def normed(x, weight, eps, N: tl.constexpr, dtype: tl.constexpr):
    """x float32 [ROWS, BLOCK], zero beyond N."""
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps)
    return (x * rstd[:, None]).to(dtype).to(tl.float32) * weight


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    eps,
    stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row[:, None] < rows) & (col[None, :] < N)
    release(PDL)
    weight = tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    wait(PDL)
    x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + row[:, None] * N + col[None, :], normed(x, weight, eps, N, dtype).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    rows,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [PARTS, rows, N]: residual += sum of x, in place; out = norm(residual)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row[:, None] < rows) & (col[None, :] < N)
    at = row[:, None] * N + col[None, :]
    release(PDL)
    weight = tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    wait(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * rows.to(tl.int64) * N + at, mask=mask, other=0.0)
    x = x.to(dtype).to(tl.float32)  # as a product that is not in parts
    total = (x + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(residual_ptr + at, total, mask=mask)
    tl.store(out_ptr + at, normed(total.to(tl.float32), weight, eps, N, dtype).to(dtype), mask=mask)


def row_shape(n: int) -> tuple[int, int, int]:
    """(BLOCK, ROWS, warps) for rows of n elements: about 8 to 16 elements a thread."""
    block = triton.next_power_of_2(n)
    rows = max(1, 1024 // block)
    return block, rows, min(16, max(2, block * rows // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    n = x.shape[-1]
    flat = x.reshape(-1, n)  # a view for a contiguous x; heads cut out of a fused projection are copied
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, rows, warps = row_shape(n)
    if flat.shape[0]:
        _rms_norm_kernel[(triton.cdiv(flat.shape[0], rows),)](
            flat,
            weight,
            out,
            flat.shape[0],
            eps,
            flat.stride(0),
            N=n,
            BLOCK=block,
            ROWS=rows,
            num_warps=warps,
            **overlap(x.device),
        )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., N] or what `linear_parts` returned, contiguous. In place: the residual becomes the sum, and x
    [..., N] the norm."""
    n = residual.shape[-1]
    block, rows, warps = row_shape(n)
    count = residual.numel() // n
    parts = x.numel() // residual.numel() if count else 1
    out = x if x.dtype == residual.dtype else torch.empty_like(residual)
    if count:
        _add_rms_norm_kernel[(triton.cdiv(count, rows),)](
            x,
            residual,
            weight,
            out,
            count,
            eps,
            N=n,
            BLOCK=block,
            ROWS=rows,
            PARTS=parts,
            num_warps=warps,
            **overlap(residual.device),
        )
    return out, residual


@triton.jit
def gated(gate, up):
    """silu(gate) * up in float32, rounded between the two as separate operations would. gate, up: of the
    model's type."""
    g = gate.to(tl.float32)
    return (g / (1.0 + tl.exp(-g))).to(gate.dtype).to(tl.float32) * up.to(tl.float32)


@triton.jit
def _silu_and_mul_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < N
    release(PDL)
    wait(PDL)
    gate = tl.load(x_ptr + row * 2 * N + col, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * 2 * N + N + col, mask=mask, other=0.0)
    tl.store(out_ptr + row * N + col, gated(gate, up).to(gate.dtype), mask=mask)


def silu_and_mul(x: Tensor) -> Tensor:
    """x contiguous [T, 2N]."""
    tokens, n = x.shape[0], x.shape[1] // 2
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if tokens:
        block = min(1024, triton.next_power_of_2(n))
        _silu_and_mul_kernel[(tokens, triton.cdiv(n, block))](
            x, out, n, BLOCK=block, num_warps=4, **overlap(x.device)
        )
    return out
