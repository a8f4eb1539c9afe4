"""Attention by FlashAttention-3: any batch in one call, the tiles scheduled on the device."""

from __future__ import annotations

import torch
from flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata
from torch import Tensor

from ..ops import BatchMetadata


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, scale: float) -> Tensor:
    """The first layer of a step has the schedule computed and keeps it in `batch.extra`. One made before a
    graph's capture is made again inside, so that each replay schedules its own lengths; its size follows from
    shapes, never from lengths."""
    capturing = torch.cuda.is_current_stream_capturing()
    block_size, kv_heads, size = k_cache.shape[1:]
    key = ("flash_attn_interface", q.shape[1], kv_heads, size, capturing)
    schedule = batch.extra.get(key)
    if schedule is None:
        schedule = batch.extra[key] = get_scheduler_metadata(
            batch_size=batch.context_lens.shape[0],
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.block_tables.shape[1] * block_size,
            num_heads_q=q.shape[1],
            num_heads_kv=kv_heads,
            headdim=size,
            cache_seqlens=batch.context_lens,
            qkv_dtype=q.dtype,
            cu_seqlens_q=batch.cu_seqlens_q,
            page_size=block_size,
            causal=True,
        )
    out: Tensor = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=batch.context_lens,
        page_table=batch.block_tables,
        cu_seqlens_q=batch.cu_seqlens_q,
        max_seqlen_q=batch.max_seqlen_q,
        softmax_scale=scale,
        causal=True,
        scheduler_metadata=schedule,
    )
    return out
