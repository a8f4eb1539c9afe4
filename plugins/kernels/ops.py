"""The operations a kernel backend supplies, and the batch description that attention reads.

A backend is one object per run; the model binds its callables once when it is built, so nothing of the plugin
system is left in the layer loop. All shapes below: T tokens in the step, B requests, H query heads, K KV
heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headway import Role

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class BatchMetadata:
    """One varlen batch: prompt chunks and decodes together, no phase flag. A decode is a row with one query
    token."""

    # int64 [T]: block * block_size + offset where each token's KV goes; -1: padding of a graph, stored
    # nowhere
    slot_mapping: Tensor
    # int32 [B, max_blocks]: physical block of each logical one; padding is the reserved block
    block_tables: Tensor
    cu_seqlens_q: Tensor  # int32 [B + 1]: row i's queries are tokens cu[i]:cu[i+1]
    context_lens: Tensor  # int32 [B]: KV length of each row after this step's tokens are stored
    max_seqlen_q: int  # 1: every row is a decode
    max_seqlen_k: int  # upper bound of context_lens
    block_size: int
    extra: dict[Hashable, Any] = field(default_factory=dict)  # a backend's own prepared buffers


@dataclass(frozen=True)
class KernelCaps:
    """What a backend can run. A composition outside of it is refused when it is built, with the reason."""

    devices: frozenset[str]  # "cpu", "cuda"
    dtypes: frozenset[str]  # "float32", "bfloat16", "float16"
    head_sizes: frozenset[int] | None = None  # None: any
    block_size_multiple: int = 1
    mixed_batches: bool = True  # prompt chunks and decodes in one call
    graph_safe: bool = False  # a step of decodes may be captured in a CUDA graph
    # so may any step: no length is read on the host, padding is neither stored nor attended to
    mixed_graphs: bool = False
    ops: frozenset[str] = frozenset()  # the operations it implements


class KernelBackend(Role):
    """One callable an operation. Subclasses implement a subset and list it in `caps.ops`; the rest comes from
    `torch`."""

    role = "kernels"
    caps: KernelCaps

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K], weight [N, K], bias [N] -> [T, N]: the projections of attention and MLP."""
        raise NotImplementedError

    def linear_parts(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Fused with add_rms_norm, which comes next: as `linear`, or float32 [P, T, N], whose sum over P it
        is."""
        raise NotImplementedError

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Fused: silu_and_mul(linear(x, weight, bias)), weight [2N, K] -> [T, N]."""
        raise NotImplementedError

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., N] -> same shape and dtype; the mean square in float32."""
        raise NotImplementedError

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); may write in place. x is like residual, or what the same
        backend's `linear_parts` returned."""
        raise NotImplementedError

    def rotary(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, H, D], k [T, K, D], positions int64 [T], cos_sin float32 [max_position, D] (cos half, then
        sin half); NeoX layout."""
        raise NotImplementedError

    def qk_norm_rope_store(
        self,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        num_heads: int,
        num_kv_heads: int,
    ) -> Tensor:
        """Fused: splits qkv [T, (H + 2K) * D], norms q and k per head, rotates both, stores k and v; returns
        q [T, H, D]. q_weight and k_weight may be None (no QK norm: Llama)."""
        raise NotImplementedError

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """x [T, 2N] (gate, up) -> silu(gate) * up, [T, N]."""
        raise NotImplementedError

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """k, v [T, K, D] into k_cache, v_cache [blocks, block_size, K, D] at slot_mapping int64 [T]."""
        raise NotImplementedError

    def attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, scale: float
    ) -> Tensor:
        """Causal paged attention, q [T, H, D] -> [T, H, D]. Row i's queries are the last of its
        context_lens[i] positions."""
        raise NotImplementedError

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """logits [B, V] -> token ids int64 [B]. temperature 0 is argmax, other rows argmax(logits /
        temperature + gumbel), so that chance is a function of (seed, position, token) only and a different
        batch never changes a sampled token. The noise is `gumbel` below, the same on every backend.

        temperature, top_p, min_p float32 [B]; top_k int32 [B] (0: off); seeds int64 [B] (request's own);
        positions int64 [B]. temperature is None: every row is greedy. top_k, top_p and min_p are None
        together: no row filters. Filters apply to softmax(logits / temperature), top_k first, then top_p on
        what is left, then min_p."""
        raise NotImplementedError

    def sample_part(
        self, logits: Tensor, temperature: Tensor | None, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """As `sample` without filters, of logits [B, V] that are a part of the vocabulary and begin with
        token `first`: the best token int64 [B], and its score float32 [B], by which the best of several parts
        is the best of all of them."""
        raise NotImplementedError

    def decode_inputs(
        self, rows: Tensor, lengths: Tensor, last_tokens: Tensor, block_tables: Tensor, block_size: int
    ) -> tuple[Tensor, ...]:
        """What a step of decodes reads of its rows int64 [B]; lengths and last_tokens int64 [R], block_tables
        int32 [R, M]. -> tokens, positions, ends = positions + 1, slots: int64 [B]; contexts = ends int32 [B];
        tables int32 [B, M]."""
        raise NotImplementedError

    def advance(self, rows: Tensor, tokens: Tensor, lengths: Tensor, last_tokens: Tensor) -> None:
        """What it leaves: the sampled tokens, and lengths longer by one. The last row is padding and stays at
        length 0."""
        raise NotImplementedError

    def update_rows(
        self,
        data: Tensor,
        num_updates: int,
        num_admitted: int,
        *,
        block_tables: Tensor,
        numbers: Tensor,
        top_k: Tensor,
        seeds: Tensor,
    ) -> None:
        """What a step says about rows, int64, at the front of `data`: updates [2, num_updates], which are
        places in block_tables (int32 [R, M], one row after the other) and the blocks there; admissions
        [num_admitted, 7], which are a row, its temperature, top_p and min_p (float32 bits, into numbers
        float32 [3, R]), top_k (int32 [R]), and the low and high word of its seed (int64 [R])."""
        raise NotImplementedError


def gumbel(seed: int, position: int, token: int) -> float:
    """The noise of one (row, vocabulary entry), as plain integers and floats: what every backend's `sample`
    must reproduce.

    A counter-based hash: C. Wellons' lowbias32 makes two 32-bit keys of seed and position, and the token goes
    through two folded multiplications (the mixer of W. Yi's wyhash, at 32 bits), so nothing is stored and no
    order of evaluation matters. u keeps 32 bits near 0, where the largest noise comes from.
    """
    low, high, mask = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, 0xFFFFFFFF
    key0 = mix32(mix32(mix32(low ^ 0x9E3779B9) ^ high) ^ (position & mask))
    key1 = mix32(mix32(mix32(high ^ 0x85EBCA6B) ^ low) ^ (position & mask))
    bits = fold32(fold32((token & mask) ^ key0, 0xD6E8FEB9) ^ key1, 0x9E3779B1)
    u = bits * (2.0**-32 - 2.0**-56) + 2.0**-33  # in (0, 1), rounded to float32 too
    return -math.log(-math.log1p(-u))


def fold32(x: int, by: int) -> int:
    """The two halves of a 64-bit product, one xor the other."""
    product = x * by
    return (product >> 32) ^ (product & 0xFFFFFFFF)


def mix32(x: int) -> int:
    """lowbias32: a bijection of 32-bit integers with low bias (C. Wellons, 2018)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
