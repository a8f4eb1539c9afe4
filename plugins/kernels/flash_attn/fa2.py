"""Attention by FlashAttention-2: its paged KV wants blocks that are multiples of 256 tokens."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from ..ops import BatchMetadata


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, scale: float) -> Tensor:
    if batch.max_seqlen_q == 1:  # split KV
        out: Tensor = flash_attn_with_kvcache(
            q.unsqueeze(1),
            k_cache,
            v_cache,
            cache_seqlens=batch.context_lens,
            block_table=batch.block_tables,
            softmax_scale=scale,
            causal=True,
        ).squeeze(1)
        return out
    # a graph computes its own, on every replay
    key = ("flash_attn", torch.cuda.is_current_stream_capturing())
    starts = batch.extra.get(key)
    if starts is None:
        ends = batch.context_lens.cumsum(0, dtype=torch.int32)
        starts = batch.extra[key] = torch.cat((ends[:1] - ends[:1], ends))  # int32 [B + 1]
    mixed: Tensor = flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        batch.cu_seqlens_q,
        starts,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        block_table=batch.block_tables,
    )
    return mixed
