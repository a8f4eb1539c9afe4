"""What happens between the fused QKV projection and attention: QK norm, rotary embedding (NeoX halves), KV
store by slot.

`qk_norm_rope_store` does all of it in one kernel, so q, k and v cross memory once. Slots are int64: a cache
may hold more than 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import overlap, release, wait


@triton.jit
def _store_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, k_stride, v_stride, N: tl.constexpr, BLOCK: tl.constexpr
):
    """One token a program; N = K * D elements of k and of v."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    col = tl.arange(0, BLOCK)
    mask = (col < N) & (slot + 0 * col >= 0)  # a token of padding is stored nowhere
    k = tl.load(k_ptr + token * k_stride + col, mask=mask)
    v = tl.load(v_ptr + token * v_stride + col, mask=mask)
    tl.store(k_cache_ptr + slot * N + col, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + slot * N + col, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k and v may be cut out of a fused projection: only the token's stride is free. The caches are
    contiguous."""
    tokens, n = k.shape[0], k.shape[1] * k.shape[2]
    k, v = _heads_together(k), _heads_together(v)
    block = triton.next_power_of_2(n)
    if tokens:
        _store_kernel[(tokens,)](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            k.stride(0),
            v.stride(0),
            N=n,
            BLOCK=block,
            num_warps=min(8, max(1, block // 256)),
        )


def _heads_together(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    position_ptr,
    cos_sin_ptr,
    q_stride,
    k_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and HEADS of its H + K heads a program; heads past H are keys."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    is_q = head < H
    mask = (head < H + K) & (col < HALF)
    source = (
        tl.where(
            is_q, q_ptr + token * q_stride + head * 2 * HALF, k_ptr + token * k_stride + (head - H) * 2 * HALF
        )
        + col
    )
    target = (
        tl.where(
            is_q, q_out_ptr + (token * H + head) * 2 * HALF, k_out_ptr + (token * K + head - H) * 2 * HALF
        )
        + col
    )
    angle = cos_sin_ptr + tl.load(position_ptr + token) * 2 * HALF + col
    cos = tl.load(angle, mask=col < HALF, other=0.0).to(tl.float32)
    sin = tl.load(angle + HALF, mask=col < HALF, other=0.0).to(tl.float32)
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target + HALF, (second * cos + first * sin).to(dtype), mask=mask)


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """New contiguous q and k; the inputs may be cut out of a fused projection."""
    q, k = _heads_together(q), _heads_together(k)
    tokens, heads, size = q.shape
    q_out, k_out = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
    )
    if tokens:
        _rotary_kernel[(tokens, triton.cdiv(heads + k.shape[1], 8))](
            q,
            k,
            q_out,
            k_out,
            positions,
            cos_sin,
            q.stride(0),
            k.stride(0),
            H=heads,
            K=k.shape[1],
            HALF=size // 2,
            HEADS=8,
            BLOCK=triton.next_power_of_2(size // 2),
            num_warps=2,
        )
    return q_out, k_out


@triton.jit
def _norm_weight(weight_ptr, col, HALF: tl.constexpr):
    first = tl.load(weight_ptr + col, mask=col < HALF, other=0.0).to(tl.float32)
    second = tl.load(weight_ptr + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    position_ptr,
    cos_sin_ptr,
    slot_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token and HEADS of its H + 2K heads a program. A value head passes through unchanged."""
    D: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    is_q, is_v = head < H, head >= H + K
    mask = (head < H + 2 * K) & (col < HALF)
    release(PDL)
    wait(PDL)
    slot = tl.load(slot_ptr + token)
    angle = cos_sin_ptr + tl.load(position_ptr + token) * D + col
    source = qkv_ptr + (token * (H + 2 * K) + head) * D + col
    x1 = tl.load(source, mask=mask, other=0.0)
    x2 = tl.load(source + HALF, mask=mask, other=0.0)
    cos = tl.load(angle, mask=col < HALF, other=0.0).to(tl.float32)
    sin = tl.load(angle + HALF, mask=col < HALF, other=0.0).to(tl.float32)
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    first, second = x1.to(tl.float32), x2.to(tl.float32)
    if NORM:
        q1, q2 = _norm_weight(q_weight_ptr, col, HALF)
        k1, k2 = _norm_weight(k_weight_ptr, col, HALF)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(first * first + second * second, axis=1) / D + eps)[:, None]
        first = ((first * rstd).to(dtype).to(tl.float32) * tl.where(is_q, q1, k1)).to(dtype).to(tl.float32)
        second = ((second * rstd).to(dtype).to(tl.float32) * tl.where(is_q, q2, k2)).to(dtype).to(tl.float32)
    y1 = tl.where(is_v, x1, (first * cos - second * sin).to(dtype))
    y2 = tl.where(is_v, x2, (second * cos + first * sin).to(dtype))
    to_q = q_out_ptr + (token * H + head) * D
    to_k = k_cache_ptr + (slot * K + head - H) * D
    to_v = v_cache_ptr + (slot * K + head - H - K) * D
    target = tl.where(is_q, to_q, tl.where(is_v, to_v, to_k)) + col
    kept = mask & (is_q | (slot + 0 * head >= 0))  # a token of padding is stored nowhere
    tl.store(target, y1, mask=kept)
    tl.store(target + HALF, y2, mask=kept)


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """qkv contiguous [T, (H + 2K) * D]; the caches are contiguous and of qkv's dtype. The weights are both
    given or both None."""
    tokens, heads = qkv.shape[0], num_heads + 2 * num_kv_heads
    size = qkv.shape[1] // heads
    q = torch.empty((tokens, num_heads, size), dtype=qkv.dtype, device=qkv.device)
    if tokens:
        block = triton.next_power_of_2(size // 2)
        rows = max(2, 512 // block)  # heads a program
        _qk_norm_rope_store_kernel[(tokens, triton.cdiv(heads, rows))](
            qkv,
            q_weight,
            k_weight,
            positions,
            cos_sin,
            slot_mapping,
            q,
            k_cache,
            v_cache,
            eps,
            H=num_heads,
            K=num_kv_heads,
            HALF=size // 2,
            HEADS=rows,
            BLOCK=block,
            NORM=q_weight is not None,
            num_warps=4,
            **overlap(qkv.device),
        )
    return q
