"""Causal paged attention for mixed batches: rows with one query go to the split-KV decode kernel, the others
to the prompt kernel.

Both kernels run over the same batch and skip each other's rows on the device, so no length is read on the
host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..ops import BatchMetadata
from .decode import decode_kernel
from .device import multiprocessors
from .overlap import NO_OVERLAP, overlap
from .plan import DecodePlan, PromptPlan, decode_plan, prompt_plan
from .prompt import prompt_kernel


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Launch shape of the decode kernel."""

    tile: int  # KV tokens
    programs: int  # a multiprocessor
    warps: int
    stages: int
    combine: int = 8192  # elements of partial results that one pass of the reduction holds
    registers: int | None = None  # bound a thread, so that `programs` of them fit on a multiprocessor


@dataclass(frozen=True, slots=True)
class PromptShape:
    """Launch shape of the prompt kernel."""

    lanes: int  # (query, head of the group) pairs: rows of a product
    tile: int  # KV tokens
    warps: int
    stages: int


def decode_shape(size: int, width: int, group: int, units: int) -> DecodeShape:
    """size: head size, padded; width: bytes an element; group: query heads a KV head; units: rows times KV
    heads.

    Measured on one H200. With much work, all programs are resident at once and keep 2 tiles each in flight:
    12 warps per multiprocessor, which leaves 168 registers per thread. With less, one tile each does as well
    and costs less to get going; with little, latency counts: the reduction takes more parts in one pass."""
    if width == 4:
        return DecodeShape(tile=16 if size > 128 else 32, programs=2, warps=4, stages=2)
    if size > 128:
        return DecodeShape(tile=32, programs=2, warps=4, stages=3)
    if units < 256:
        return DecodeShape(tile=64, programs=3, warps=4, stages=3)
    if group > 4:
        return DecodeShape(
            tile=min(64, 4096 // size), programs=6, warps=2, stages=3, combine=4096, registers=168
        )
    stages = 2 if units < 512 else 3
    # the compiler stops at 168 registers
    return DecodeShape(tile=min(128, 8192 // size), programs=3, warps=4, stages=stages, combine=2048)


def prompt_shape(size: int, width: int) -> PromptShape:
    """size: head size; width: bytes an element."""
    if width == 4:
        return PromptShape(lanes=16, tile=16 if size > 128 else 32, warps=4, stages=1)
    return PromptShape(lanes=128, tile=32 if size > 128 else 64, warps=8, stages=2 if size > 128 else 3)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: BatchMetadata,
    scale: float,
    decode: DecodeShape | None = None,
    prompt: PromptShape | None = None,
) -> Tensor:
    """The plan is made by the first layer of a step and kept in `batch.extra`: one BatchMetadata a step. A
    plan made outside of a graph's capture is made again inside, so that every replay computes it from the
    lengths of its own step."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kv_heads, size = k_cache.shape[2:]
    group = q.shape[1] // kv_heads
    if not q.shape[0]:
        return out
    capturing = _capturing(q.device)
    decode = decode or decode_shape(
        triton.next_power_of_2(size), q.element_size(), group, batch.context_lens.shape[0] * kv_heads
    )
    key = ("triton decode", kv_heads, group, size, decode, capturing)
    decode_work = batch.extra.get(key)
    # by an earlier layer: this kernel may read the plan before the kernel before it has ended
    planned = decode_work is not None
    if decode_work is None:
        shares = max(1, multiprocessors(q.device) * decode.programs // kv_heads)
        decode_work = batch.extra[key] = decode_plan(batch, shares, decode.tile, kv_heads, group, size)
    _decode(
        q,
        k_cache,
        v_cache,
        out,
        batch,
        scale,
        decode_work,
        decode,
        group,
        overlap(q.device) if planned else NO_OVERLAP,
    )
    if batch.max_seqlen_q > 1:
        prompt = prompt or prompt_shape(size, q.element_size())
        queries = prompt.lanes // group  # a tile
        prompt_key = ("triton prompt", queries, capturing)
        prompt_work = batch.extra.get(prompt_key)
        if prompt_work is None:
            prompt_work = batch.extra[prompt_key] = prompt_plan(batch, q.shape[0], queries)
        _prompt(q, k_cache, v_cache, out, batch, scale, prompt_work, prompt, group)
    return out


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    batch: BatchMetadata,
    scale: float,
    plan: DecodePlan,
    shape: DecodeShape,
    group: int,
    launch: dict[str, bool],
) -> None:
    block_size, kv_heads, size = k_cache.shape[1:]
    padded = triton.next_power_of_2(size)
    heads = triton.next_power_of_2(group)
    decode_kernel[(kv_heads, plan.shares)](
        q,
        k_cache,
        v_cache,
        out,
        batch.block_tables,
        batch.context_lens,
        batch.cu_seqlens_q,
        plan.first,
        plan.row,
        plan.arrived,
        plan.partial,
        plan.stats,
        batch.context_lens.shape[0],
        scale * math.log2(math.e),
        q.stride(0),
        batch.block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        K=kv_heads,
        G=group,
        D=size,
        BLOCK_SIZE=block_size,
        M=max(16, heads),
        D_PAD=padded,
        TILE=plan.tile,
        PARTS=max(2, shape.combine // (heads * padded)),
        G_PAD=heads,
        num_warps=shape.warps,
        num_stages=shape.stages,
        maxnreg=shape.registers,
        **launch,
    )


def _prompt(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    batch: BatchMetadata,
    scale: float,
    plan: PromptPlan,
    shape: PromptShape,
    group: int,
) -> None:
    block_size, kv_heads, size = k_cache.shape[1:]
    prompt_kernel[(kv_heads, plan.programs)](
        q,
        k_cache,
        v_cache,
        out,
        batch.block_tables,
        batch.context_lens,
        batch.cu_seqlens_q,
        plan.first,
        plan.row,
        batch.context_lens.shape[0],
        scale * math.log2(math.e),
        q.stride(0),
        batch.block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        K=kv_heads,
        G=group,
        D=size,
        BLOCK_SIZE=block_size,
        M=shape.lanes,
        D_PAD=triton.next_power_of_2(size),
        TILE=shape.tile,
        TILE_Q=shape.lanes // group,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
