"""Sampling: argmax, or Gumbel-max with the counter-based noise of `plugins/kernels/ops.py`; top-k, top-p and min-p by threshold.

No sort: every filter keeps the tokens at or above some logit, and that logit is found by bisection over float32 bit patterns, which
is exact. Without filters the logits are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda.libdevice import fast_logf

NEAR = 8192  # logits a row that the bisection of filters works on
REACH = 12.0  # how far below the highest logit they may lie: a mass of 6e-6 each


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(seed, position, token, log: tl.constexpr):
    """seed, position int64, token int32; as `plugins.kernels.ops.gumbel`, to a few units in the last place."""
    low, high, at = seed.to(tl.uint32), (seed >> 32).to(tl.uint32), position.to(tl.uint32)
    key0 = _mix32(_mix32(_mix32(low ^ 0x9E3779B9) ^ high) ^ at)
    key1 = _mix32(_mix32(_mix32(high ^ 0x85EBCA6B) ^ low) ^ at)
    bits = _mix32(_mix32(token.to(tl.uint32) ^ key0) ^ key1)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    # -log1p(-u): its series where 1 - u would lose u's low bits
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7 + u * (1 / 8))))))))
    return -log(tl.where(u < 0.125, series, -log(1.0 - u)))


@triton.jit
def _log(x):
    return tl.log(x)


@triton.jit
def _fast_log(x):
    """The hardware's logarithm, to 2^-22: noise costs two for every vocabulary entry."""
    return fast_logf(x)


@triton.jit
def _scaled(logits_ptr, token, V, inverse):
    """Logits over temperature (times its inverse), -inf past the vocabulary."""
    return tl.load(logits_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32) * inverse


@triton.jit
def _best_of_chunk_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, floor_ptr, best_ptr, token_ptr, V, stride, chunks,
    BLOCK: tl.constexpr, SAMPLED: tl.constexpr, FILTERED: tl.constexpr, log: tl.constexpr,
):  # fmt: skip
    """The best token of BLOCK vocabulary entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    score = _scaled(logits_ptr + row * stride, token, V, 1.0)
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
        if temperature != 0.0:
            score *= 1.0 / temperature
            if FILTERED:
                score = tl.where(score < tl.load(floor_ptr + row), float("-inf"), score)
            score += _gumbel(tl.load(seed_ptr + row), tl.load(position_ptr + row), token, log)
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
def _count(x_ptr, length, inverse, key, BLOCK: tl.constexpr):
    """How many scaled logits have at least this key."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        count += (_key(_scaled(x_ptr, start + lane, length, inverse)) >= key).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _mass(x_ptr, length, inverse, highest, key, BLOCK: tl.constexpr):
    """Sum of exp(x - highest) over the scaled logits with at least this key."""
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        x = _scaled(x_ptr, start + lane, length, inverse)
        mass += tl.where(_key(x) >= key, tl.exp(x - highest), 0.0)
    return tl.sum(mass)


@triton.jit
def _floor_of(x_ptr, length, inverse, highest, bottom, total, top_k, top_p, V, BLOCK: tl.constexpr):
    """Key of the lowest scaled logit that top-k and then top-p keep, out of `length` logits that hold it; bottom: a key below it;
    total: the mass of all of the row's tokens."""
    top = _key(highest)
    if (top_k > 0) & (top_k < V):  # the largest key that at least top_k tokens reach
        lo, hi = bottom, top
        while lo < hi:
            at = _middle(lo, hi) + 1
            if _count(x_ptr, length, inverse, at, BLOCK) >= top_k:
                lo = at
            else:
                hi = at - 1
        bottom = lo
        total = _mass(x_ptr, length, inverse, highest, bottom, BLOCK)
    if top_p < 1.0:  # the smallest key above which less than top_p of the kept mass lies
        lo, hi = bottom, top
        while lo < hi:
            at = _middle(lo, hi)
            if _mass(x_ptr, length, inverse, highest, at + 1, BLOCK) < top_p * total:
                hi = at
            else:
                lo = at + 1
        bottom = lo
    return bottom


@triton.jit
def _floor_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, floor_ptr, near_ptr, V, stride,
    BLOCK: tl.constexpr, NEAR: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """One row a program: the lowest scaled logit that the row's filters keep. The bisection runs over the logits within REACH of the
    highest, copied together, wherever they hold the answer and are at most NEAR; else over the row."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    near = near_ptr + row * NEAR
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    by_count, by_mass = (top_k > 0) & (top_k < V), top_p < 1.0
    floor = float("-inf")
    if (temperature != 0.0) & (by_count | by_mass | (min_p > 0.0)):
        inverse = 1.0 / temperature
        lane = tl.arange(0, BLOCK)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            most = tl.maximum(most, _scaled(logits, start + lane, V, inverse))
        highest = tl.max(most)
        if by_count | by_mass:
            found = 0
            mass = tl.zeros([BLOCK], tl.float32)
            near_mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                x = _scaled(logits, start + lane, V, inverse)
                weight = tl.exp(x - highest)
                close = x >= highest - REACH
                mass += weight
                near_mass += tl.where(close, weight, 0.0)
                at = found + tl.cumsum(close.to(tl.int32), axis=0) - 1
                tl.store(near + at, x, mask=close & (at < NEAR))
                found += tl.sum(close.to(tl.int32))
            tl.debug_barrier()  # the copies are read by other threads
            total = tl.sum(mass)
            enough = (found <= NEAR) & (found >= tl.where(by_count, top_k, 0)) & (by_count | (tl.sum(near_mass) >= top_p * total))
            if enough:
                key = _floor_of(near, found, 1.0, highest, _key(highest - REACH), total, top_k, top_p, V, BLOCK)
            else:
                key = _floor_of(logits, V, inverse, highest, _key(floor), total, top_k, top_p, V, BLOCK)
            floor = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
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
        near = torch.empty((rows, NEAR), dtype=torch.float32, device=device)
        _floor_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, floor, near, vocab, logits.stride(0),
            BLOCK=min(2 * block, 8192), NEAR=NEAR, REACH=REACH, num_warps=16,
        )  # fmt: skip
    _best_of_chunk_kernel[(rows, chunks)](
        logits, temperature, seeds, positions, floor, best, token, vocab, logits.stride(0), chunks,
        BLOCK=block, SAMPLED=temperature is not None, FILTERED=filtered, log=_fast_log if logits.is_cuda else _log, num_warps=4,
    )  # fmt: skip
    _best_of_row_kernel[(rows,)](best, token, out, chunks, CHUNKS=max(2, triton.next_power_of_2(chunks)), num_warps=1)
    return out
