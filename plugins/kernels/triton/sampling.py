"""Sampling: argmax, or Gumbel-max with the counter-based noise of `plugins/kernels/ops.py`; top-k, top-p and min-p by threshold.

No sort: every filter keeps the tokens at or above some logit, and that logit is found by bisection over float32 bit patterns, which
is exact. Without filters the logits are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(seed, position, token):
    """seed, position int64, token int32; as `plugins.kernels.ops.gumbel`."""
    low, high, at = seed.to(tl.uint32), (seed >> 32).to(tl.uint32), position.to(tl.uint32)
    key0 = _mix32(_mix32(_mix32(low ^ 0x9E3779B9) ^ high) ^ at)
    key1 = _mix32(_mix32(_mix32(high ^ 0x85EBCA6B) ^ low) ^ at)
    bits = _mix32(_mix32(token.to(tl.uint32) ^ key0) ^ key1)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    rest = 1.0 - u  # log1p(-u): log(rest) corrected for the rounding of rest (W. Kahan)
    log1p = tl.where(rest == 1.0, -u, tl.log(rest) * (u / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(-log1p)


@triton.jit
def _scaled(logits_ptr, token, V, temperature):
    """Logits over temperature, -inf past the vocabulary. Division, not a product with the reciprocal: the reference's rounding."""
    x = tl.load(logits_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, tl.zeros_like(x) + temperature)


@triton.jit
def _best_of_chunk_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, floor_ptr, best_ptr, token_ptr, V, stride, chunks,
    BLOCK: tl.constexpr, SAMPLED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """The best token of BLOCK vocabulary entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    temperature = 0.0
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
    score = _scaled(logits_ptr + row * stride, token, V, tl.where(temperature == 0.0, 1.0, temperature))
    if SAMPLED:
        if temperature != 0.0:
            if FILTERED:
                score = tl.where(score < tl.load(floor_ptr + row), float("-inf"), score)
            score += _gumbel(tl.load(seed_ptr + row), tl.load(position_ptr + row), token)
    best, at = tl.max(score, axis=0, return_indices=True)  # ties: the first
    tl.store(best_ptr + row * chunks + chunk, best)
    tl.store(token_ptr + row * chunks + chunk, chunk * BLOCK + at)


@triton.jit
def _best_of_row_kernel(best_ptr, token_ptr, out_ptr, chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    best = tl.load(best_ptr + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    _, at = tl.max(best, axis=0, return_indices=True)
    tl.store(out_ptr + row, tl.load(token_ptr + row * chunks + at).to(tl.int64))


@triton.jit
def _key(x):
    """float32 -> int32 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _middle(lo, hi):
    """Midpoint rounded down, without overflow."""
    return (lo & hi) + ((lo ^ hi) >> 1)


@triton.jit
def _mass(logits_ptr, V, temperature, highest, lowest_key, BLOCK: tl.constexpr):
    """Sum of exp(x - highest) over the tokens with key >= lowest_key."""
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = _scaled(logits_ptr, start + lane, V, temperature)
        mass += tl.where(_key(x) >= lowest_key, tl.exp(x - highest), 0.0)
    return tl.sum(mass)


@triton.jit
def _floor_kernel(logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, floor_ptr, V, stride, BLOCK: tl.constexpr):
    """One row a program: the lowest scaled logit that the row's filters keep."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    by_count, by_mass = (top_k > 0) & (top_k < V), top_p < 1.0
    floor = float("-inf")
    if (temperature != 0.0) & (by_count | by_mass | (min_p > 0.0)):
        lane = tl.arange(0, BLOCK)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            most = tl.maximum(most, _scaled(logits, start + lane, V, temperature))
        highest = tl.max(most)
        top = _key(highest)
        bottom = _key(floor)
        if by_count:  # the largest key that at least top_k tokens reach
            lo, hi = bottom, top
            while lo < hi:
                at = _middle(lo, hi) + 1
                count = tl.zeros([BLOCK], tl.int32)
                for start in range(0, V, BLOCK):
                    count += (_key(_scaled(logits, start + lane, V, temperature)) >= at).to(tl.int32)
                if tl.sum(count) >= top_k:
                    lo = at
                else:
                    hi = at - 1
            bottom = lo
        if by_mass:  # the smallest key above which less than top_p of the kept mass lies
            limit = top_p * _mass(logits, V, temperature, highest, bottom, BLOCK)
            lo, hi = bottom, top
            while lo < hi:
                at = _middle(lo, hi)
                if _mass(logits, V, temperature, highest, at + 1, BLOCK) < limit:
                    hi = at
                else:
                    lo = at + 1
            bottom = lo
        floor = tl.where(bottom < 0, bottom ^ 0x7FFFFFFF, bottom).to(tl.float32, bitcast=True)
        if min_p > 0.0:
            floor = tl.maximum(floor, tl.minimum(highest + tl.log(min_p), highest))
    tl.store(floor_ptr + row, floor)


def sample(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, seeds: Tensor, positions: Tensor
) -> Tensor:
    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    device = logits.device
    block = min(4096, max(16, triton.next_power_of_2(vocab)))
    chunks = triton.cdiv(vocab, block)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    token = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    filtered = temperature is not None and top_k is not None
    floor = torch.empty(rows, dtype=torch.float32, device=device) if filtered else None
    if filtered:
        _floor_kernel[(rows,)](logits, temperature, top_k, top_p, min_p, floor, vocab, logits.stride(0), BLOCK=block, num_warps=16)
    _best_of_chunk_kernel[(rows, chunks)](
        logits, temperature, seeds, positions, floor, best, token, vocab, logits.stride(0), chunks,
        BLOCK=block, SAMPLED=temperature is not None, FILTERED=filtered, num_warps=8,
    )  # fmt: skip
    _best_of_row_kernel[(rows,)](best, token, out, chunks, CHUNKS=max(2, triton.next_power_of_2(chunks)), num_warps=1)
    return out
