"""Sampling: argmax, or Gumbel-max with the counter-based noise of `plugins/kernels/ops.py`; top-k, top-p and
min-p by threshold.

No sort: every filter keeps the tokens at or above some logit, and that logit is found by bisection over
float32 bit patterns, which is exact. Without filters the logits are read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import overlap, release, wait

NEAR = 8192  # logits a row that the bisection of filters works on
REACH = 12.0  # how far below the highest logit they may lie: a mass of 6e-6 each


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _fold(x, by: tl.constexpr):
    product = x.to(tl.uint64) * by
    return (product ^ (product >> 32)).to(tl.uint32)


@triton.jit
def _noise(x, key1, minus_log2: tl.constexpr):
    """x uint32: token ^ key0. `plugins.kernels.ops.gumbel` in units of ln 2, and a constant more, to 3e-6:
    the hardware's logarithm is 2^-22 off."""
    bits = _fold(_fold(x, 0xD6E8FEB9) ^ key1, 0x9E3779B1)
    u = tl.fma(bits.to(tl.float32), 2.3283062977608182e-10, 1.1641532182693481e-10)
    # -log2(1 - u): a polynomial, 2e-6 off, where 1 - u would lose u's low bits
    near = u * tl.fma(tl.fma(u, 0.5167805, 0.7204905), u, 1.4426980)
    return minus_log2(tl.where(u < 0.0625, near, minus_log2(1.0 - u)))


@triton.jit
def _minus_log2(x):
    return -tl.log2(x)


@triton.jit
def _fast_minus_log2(x):
    """One instruction: the sign becomes part of what reads it. What is below 2^-126 counts as 0, which no
    argument here is."""
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1; neg.f32 $0, $0;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _scaled(logits_ptr, token, V, inverse):
    """Logits over temperature (times its inverse), -inf past the vocabulary."""
    return tl.load(logits_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32) * inverse


@triton.jit
def _chance(
    row, temperature_ptr, seed_ptr, position_ptr, floor_ptr, SAMPLED: tl.constexpr, FILTERED: tl.constexpr
):
    """What a row's scores depend on besides its logits: its temperature, the keys of its noise and its
    floor."""
    temperature, key0, key1, floor = 0.0, 0, 0, float("-inf")
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
        seed, at = tl.load(seed_ptr + row), tl.load(position_ptr + row).to(tl.uint32)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        key0 = _mix32(_mix32(_mix32(low ^ 0x9E3779B9) ^ high) ^ at)
        key1 = _mix32(_mix32(_mix32(high ^ 0x85EBCA6B) ^ low) ^ at)
        if FILTERED:
            floor = tl.load(floor_ptr + row)
    return temperature, key0, key1, floor


@triton.jit
def _scores(
    logits_ptr,
    start,
    V,
    temperature,
    key0,
    key1,
    floor,
    BLOCK: tl.constexpr,
    SAMPLED: tl.constexpr,
    FILTERED: tl.constexpr,
    FIRST: tl.constexpr,
    minus_log2: tl.constexpr,
):
    """The scores of BLOCK logits from `start`, a multiple of BLOCK, which belong to the tokens from FIRST +
    start: a greedy row's logits; another's logits over temperature, with noise, in units of ln 2."""
    lane = tl.arange(0, BLOCK)
    score = _scaled(logits_ptr, start + lane, V, 1.0)
    if SAMPLED:
        if temperature != 0.0:
            inverse = 1.0 / temperature
            if FILTERED:
                score = tl.where(score * inverse < floor, float("-inf"), score)
            if FIRST % BLOCK == 0:
                # token ^ key0, with what all lanes share in one
                x = lane.to(tl.uint32) ^ ((FIRST + start).to(tl.uint32) ^ key0)
            else:
                x = (FIRST + start + lane).to(tl.uint32) ^ key0
            score = tl.fma(score, inverse * 1.4426950408889634, _noise(x, key1, minus_log2))
    return score


@triton.jit
def _best_of_chunk_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    floor_ptr,
    best_ptr,
    V,
    stride,
    chunks,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SAMPLED: tl.constexpr,
    FILTERED: tl.constexpr,
    FIRST: tl.constexpr,
    minus_log2: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best score of TILES * BLOCK vocabulary entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    start = chunk * TILES * BLOCK
    release(PDL)
    wait(PDL)
    temperature, key0, key1, floor = _chance(
        row, temperature_ptr, seed_ptr, position_ptr, floor_ptr, SAMPLED, FILTERED
    )
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for _ in range(TILES):
        score = _scores(
            logits_ptr + row * stride,
            start,
            V,
            temperature,
            key0,
            key1,
            floor,
            BLOCK,
            SAMPLED,
            FILTERED,
            FIRST,
            minus_log2,
        )
        best = tl.maximum(best, score)
        start += BLOCK
    tl.store(best_ptr + row * chunks + chunk, tl.max(best))


@triton.jit
def _best_of_row_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    floor_ptr,
    best_ptr,
    out_ptr,
    score_ptr,
    V,
    stride,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SAMPLED: tl.constexpr,
    FILTERED: tl.constexpr,
    FIRST: tl.constexpr,
    minus_log2: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best token: the scores of the best chunk once more, which is cheaper than to carry an index beside
    every score. Its score as well where score_ptr is given."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNKS)
    release(PDL)
    wait(PDL)
    temperature, key0, key1, floor = _chance(
        row, temperature_ptr, seed_ptr, position_ptr, floor_ptr, SAMPLED, FILTERED
    )
    best = tl.load(best_ptr + row * chunks + at, mask=at < chunks, other=float("-inf"))
    start = tl.argmax(best, axis=0) * CHUNK  # ties: the first
    score = _scores(
        logits_ptr + row * stride,
        start,
        V,
        temperature,
        key0,
        key1,
        floor,
        CHUNK,
        SAMPLED,
        FILTERED,
        FIRST,
        minus_log2,
    )
    tl.store(out_ptr + row, (FIRST + start + tl.argmax(score, axis=0)).to(tl.int64))
    if score_ptr is not None:
        tl.store(score_ptr + row, tl.max(score))


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
    """Key of the lowest scaled logit that top-k and then top-p keep, out of `length` logits that hold it;
    bottom: a key below it; total: the mass of all of the row's tokens."""
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
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    floor_ptr,
    near_ptr,
    V,
    stride,
    BLOCK: tl.constexpr,
    NEAR: tl.constexpr,
    REACH: tl.constexpr,
):
    """One row a program: the lowest scaled logit that the row's filters keep. The bisection runs over the
    logits within REACH of the highest, copied together, wherever they hold the answer and are at most NEAR;
    else over the row."""
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
            enough = (
                (found <= NEAR)
                & (found >= tl.where(by_count, top_k, 0))
                & (by_count | (tl.sum(near_mass) >= top_p * total))
            )
            if enough:
                key = _floor_of(
                    near, found, 1.0, highest, _key(highest - REACH), total, top_k, top_p, V, BLOCK
                )
            else:
                key = _floor_of(logits, V, inverse, highest, _key(floor), total, top_k, top_p, V, BLOCK)
            floor = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
        if min_p > 0.0:
            floor = tl.maximum(floor, tl.minimum(highest + tl.log(min_p), highest))
    tl.store(floor_ptr + row, floor)


def _shape(rows: int, vocab: int) -> tuple[int, int, int]:
    """(BLOCK, TILES, warps): BLOCK * TILES vocabulary entries a program, short where there are few programs.
    No token depends on it."""
    block, tiles, warps = (1024, 1, 4) if rows <= 16 else (2048, 4, 4)
    return min(block, max(16, triton.next_power_of_2(vocab))), tiles, warps


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    logits = _rows(logits)
    if temperature is None or top_k is None or not len(logits):
        return _best(logits, temperature, seeds, positions)[0]
    rows, vocab = logits.shape
    floor = torch.empty(rows, dtype=torch.float32, device=logits.device)
    near = torch.empty((rows, NEAR), dtype=torch.float32, device=logits.device)
    _floor_kernel[(rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        floor,
        near,
        vocab,
        logits.stride(0),
        BLOCK=min(8192, max(32, triton.next_power_of_2(vocab))),
        NEAR=NEAR,
        REACH=REACH,
        num_warps=16,
    )
    return _best(logits, temperature, seeds, positions, floor=floor)[0]


def sample_part(
    logits: Tensor, temperature: Tensor | None, seeds: Tensor, positions: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    scores = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    return _best(_rows(logits), temperature, seeds, positions, first=first, scores=scores)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _best(
    logits: Tensor,
    temperature: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    *,
    floor: Tensor | None = None,
    first: int = 0,
    scores: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """(best token of each row, `scores` with its score); floor: of rows with filters."""
    rows, vocab = logits.shape
    device = logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out, scores
    block, tiles, warps = _shape(rows, vocab)
    chunk = block * tiles
    chunks = triton.cdiv(vocab, chunk)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    chance = (logits, temperature, seeds, positions, floor, best)
    options = {
        "SAMPLED": temperature is not None,
        "FILTERED": floor is not None,
        "FIRST": first,
        "minus_log2": _fast_minus_log2 if logits.is_cuda else _minus_log2,
        **overlap(device),
    }
    _best_of_chunk_kernel[(rows, chunks)](
        *chance, vocab, logits.stride(0), chunks, BLOCK=block, TILES=tiles, num_warps=warps, **options
    )
    _best_of_row_kernel[(rows,)](
        *chance,
        out,
        scores,
        vocab,
        logits.stride(0),
        chunks,
        CHUNK=chunk,
        CHUNKS=max(2, triton.next_power_of_2(chunks)),
        num_warps=max(1, min(8, chunk // 256)),
        **options,
    )
    return out, scores
