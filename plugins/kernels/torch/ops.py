"""Every operation in plain torch; shapes and contracts as in `plugins/kernels/ops.py`. What other backends
are checked against.

Half-precision inputs are computed in float32; float32 and float64 inputs in their own precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compose import separate
from ..ops import BatchMetadata


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def decode_inputs(
    rows: Tensor, lengths: Tensor, last_tokens: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, ...]:
    positions, tables = lengths[rows], block_tables[rows]
    blocks = tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1).long()
    ends = positions + 1
    return (
        last_tokens[rows],
        positions,
        ends,
        blocks * block_size + positions % block_size,
        ends.int(),
        tables,
    )


def advance(rows: Tensor, tokens: Tensor, lengths: Tensor, last_tokens: Tensor) -> None:
    last_tokens[rows] = tokens
    lengths[rows] = torch.where(rows == lengths.shape[0] - 1, 0, lengths[rows] + 1)


def update_rows(
    data: Tensor,
    num_updates: int,
    num_admitted: int,
    *,
    block_tables: Tensor,
    numbers: Tensor,
    top_k: Tensor,
    seeds: Tensor,
) -> None:
    if n := num_updates:
        block_tables.view(-1).index_copy_(0, data[:n], data[n : 2 * n].int())
    if num_admitted:
        admissions = data[2 * num_updates : 2 * num_updates + 7 * num_admitted].view(num_admitted, 7)
        rows, words = admissions[:, 0], admissions[:, 1:].int()
        numbers[:, rows] = words[:, :3].view(torch.float32).t()
        top_k[rows] = words[:, 3]
        seeds[rows] = words[:, 4:].reshape(-1).clone().view(torch.int64)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # float32 [T, 1, D / 2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _wide(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, k.to(k_cache.dtype))
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v.to(v_cache.dtype))


qk_norm_rope_store = separate(rms_norm, rotary, store_kv)


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, scale: float) -> Tensor:
    """Decode rows together in one padded product; rows with several queries one by one."""
    if batch.max_seqlen_q == 1:
        return _decode(q, k_cache, v_cache, batch.block_tables, batch.context_lens, batch.max_seqlen_k, scale)
    starts, contexts = batch.cu_seqlens_q.tolist(), batch.context_lens.tolist()
    out = torch.empty_like(q)
    single = [i for i in range(len(contexts)) if starts[i + 1] - starts[i] == 1]
    if single:
        rows = torch.tensor(single, device=q.device)  # int64
        tokens = batch.cu_seqlens_q[rows].long()
        longest = max(contexts[i] for i in single)
        out[tokens] = _decode(
            q[tokens], k_cache, v_cache, batch.block_tables[rows], batch.context_lens[rows], longest, scale
        )
    for i, context in enumerate(contexts):
        begin, end = starts[i], starts[i + 1]
        if end - begin > 1:
            blocks = batch.block_tables[i, : -(-context // batch.block_size)]
            # [1, L, K, D]
            k, v = (cache[blocks].flatten(0, 1)[:context].unsqueeze(0) for cache in (k_cache, v_cache))
            at = torch.arange(context, device=q.device)
            out[begin:end] = _attend(
                q[begin:end].unsqueeze(0), k, v, at <= at[begin - end :].unsqueeze(1), scale
            )[0]
    return out


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, contexts: Tensor, longest: int, scale: float
) -> Tensor:
    """q [B, H, D]: one query a row, against the first `contexts` positions of its blocks."""
    block_size, kv_heads, size = k_cache.shape[1:]
    tables = tables[:, : -(-longest // block_size)].long()
    at = torch.arange(tables.shape[1] * block_size, device=q.device)
    visible = at < contexts.unsqueeze(1)  # bool [B, L]
    slots = (tables * block_size).repeat_interleave(block_size, dim=1) + at % block_size
    # What stands after a row's context may be anything, NaN included, and a weight of 0 does not silence
    # that: its first position is read instead.
    slots = torch.where(visible, slots, slots[:, :1]).flatten()
    k, v = (
        cache.flatten(0, 1).index_select(0, slots).view(*visible.shape, kv_heads, size)
        for cache in (k_cache, v_cache)
    )
    return _attend(q.unsqueeze(1), k, v, visible[:, None, None, :], scale).squeeze(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [B, Q, H, D], k and v [B, L, K, D], mask bool, true where a query sees a key, broadcast to [B, H, Q,
    L] -> [B, Q, H, D]."""
    queries, keys, values = (_wide(x).transpose(1, 2) for x in (q, k, v))
    return (
        F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        .transpose(1, 2)
        .to(q.dtype)
    )


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    if temperature is None:
        return logits.argmax(-1)
    scaled = _scaled(logits, temperature)
    if top_k is not None and top_p is not None and min_p is not None:
        scaled = _filtered(scaled, top_k, top_p, min_p)
    return (scaled + _noise(scaled, temperature, seeds, positions)).argmax(-1)


def sample_part(
    logits: Tensor, temperature: Tensor | None, seeds: Tensor, positions: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    scores = logits.float()
    if temperature is not None:
        scores = _scaled(logits, temperature)
        scores = scores + _noise(scores, temperature, seeds, positions, first)
    best = scores.argmax(-1, keepdim=True)
    return best.squeeze(1) + first, scores.gather(1, best).squeeze(1)


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """float32 [B, V]; greedy rows as they are."""
    return logits.float() / temperature.masked_fill(temperature == 0, 1.0).unsqueeze(1)


def _noise(scaled: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int = 0) -> Tensor:
    """Of the tokens from `first` on; none in greedy rows."""
    return _gumbel(seeds, positions, scaled.shape[-1], first).masked_fill(
        (temperature == 0).unsqueeze(1), 0.0
    )


def _filtered(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits [B, V] with -inf wherever a row's filters exclude a token; ties at the edge of top-k all
    stay."""
    vocab = scaled.shape[-1]
    ordered = scaled.sort(-1, descending=True).values
    last = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long() - 1
    floor = ordered.gather(1, last.unsqueeze(1))
    probabilities = ordered.masked_fill(ordered < floor, float("-inf")).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the more likely tokens
    kept = (before < top_p.unsqueeze(1)) & (probabilities >= min_p.unsqueeze(1) * probabilities[:, :1])
    kept[:, 0] = True
    floor = torch.maximum(floor, ordered.gather(1, kept.sum(-1, keepdim=True) - 1))
    return scaled.masked_fill(scaled < floor, float("-inf"))


def _gumbel(seeds: Tensor, positions: Tensor, count: int, first: int = 0) -> Tensor:
    """float32 [B, count]: `plugins.kernels.ops.gumbel` for every row and token from `first` on."""
    low, high, at = _int32(seeds), _int32(seeds >> 32), _int32(positions)
    key0 = _mix32(_mix32(_mix32(low ^ _signed(0x9E3779B9)) ^ high) ^ at).unsqueeze(1)
    key1 = _mix32(_mix32(_mix32(high ^ _signed(0x85EBCA6B)) ^ low) ^ at).unsqueeze(1)
    token = torch.arange(first, first + count, dtype=torch.int32, device=seeds.device)
    bits = _fold32(_fold32(_unsigned(token ^ key0), 0xD6E8FEB9) ^ _unsigned(key1), 0x9E3779B1)
    u = bits.float().mul_(2.0**-32 - 2.0**-56).add_(2.0**-33)
    return u.neg_().log1p_().neg_().log_().neg_()


def _fold32(x: Tensor, by: int) -> Tensor:
    """x int64 below 2^32; the product wraps as 64 unsigned bits do, and only those of its halves are kept."""
    product = x * by
    return ((product >> 32) ^ product) & 0xFFFFFFFF


def _unsigned(x: Tensor) -> Tensor:
    """int32's bits as an int64 below 2^32."""
    return x.long() & 0xFFFFFFFF


def _int32(x: Tensor) -> Tensor:
    """The low 32 bits, as a signed integer."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def _mix32(x: Tensor) -> Tensor:
    """lowbias32 on int32: the product wraps, and `>>` carries the sign, so what it brings in is masked
    away."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(0x7FEB352D)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)
