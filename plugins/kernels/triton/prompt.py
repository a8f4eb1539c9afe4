"""Paged causal attention for rows with several queries: prompt chunks, whole prompts, speculative drafts
(FlashAttention-2's loop).

A program takes TILE_Q consecutive queries of one row and all G query heads of one KV head: TILE_Q * G rows of
one `tl.dot`, so a K or V tile is read once for the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .paging import block_of


@triton.jit
def _walk(
    q,
    acc,
    norm,
    highest,
    position,
    table,
    k_ptr,
    v_ptr,
    lo,
    hi,
    context,
    block_stride,
    slot_stride,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """KV positions lo:hi in steps of TILE. EDGE: the tiles on the causal diagonal, which need a mask."""
    dim = tl.arange(0, D_PAD)
    # looked up one step ahead, as in the decode kernel
    block = block_of(table, lo, context, BLOCK_SIZE, TILE)
    for start in range(lo, hi, TILE):
        column = start + tl.arange(0, TILE)
        valid = column < context
        offset = block.to(tl.int64) * block_stride + (column % BLOCK_SIZE) * slot_stride
        at = offset[:, None] + dim[None, :]
        if EDGE:
            mask = valid[:, None] & (dim[None, :] < D)
            k = tl.load(k_ptr + at, mask=mask, other=0.0)
            v = tl.load(v_ptr + at, mask=mask, other=0.0)
        elif D == D_PAD:
            k = tl.load(k_ptr + at)
            v = tl.load(v_ptr + at)
        else:
            k = tl.load(k_ptr + at, mask=dim[None, :] < D, other=0.0)
            v = tl.load(v_ptr + at, mask=dim[None, :] < D, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if EDGE:
            score = tl.where(column[None, :] <= position[:, None], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1) * scale)
        weight = tl.exp2(score * scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        norm = norm * shrink + tl.sum(weight, axis=1)
        highest = higher
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        block = block_of(table, start + TILE, context, BLOCK_SIZE, TILE)
    return acc, norm, highest


@triton.jit(do_not_specialize=["rows"])
def prompt_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    len_ptr,
    cu_q_ptr,
    first_ptr,
    row_ptr,
    rows,
    scale,
    q_stride,
    table_stride,
    block_stride,
    slot_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    TILE_Q: tl.constexpr,
):
    """q [T, K * G, D], out the same; caches [blocks, BLOCK_SIZE, K, D]. scale includes log2(e). M >= TILE_Q *
    G."""
    head = tl.program_id(0)
    number = tl.num_programs(1) - 1 - tl.program_id(1)  # a row's last tiles are its longest: they start first
    if number < tl.load(first_ptr + rows):
        row = tl.load(row_ptr + number)
        begin = tl.load(cu_q_ptr + row)
        queries = tl.load(cu_q_ptr + row + 1) - begin
        context = tl.load(len_ptr + row)
        start = (number - tl.load(first_ptr + row)) * TILE_Q  # first query of the tile within the row
        lane = tl.arange(0, M)
        query = start + lane // G
        dim = tl.arange(0, D_PAD)
        at = (head * G + lane % G)[:, None] * D + dim[None, :]
        mask = ((query < queries) & (lane < TILE_Q * G))[:, None] & (dim[None, :] < D)
        token = (begin + query).to(tl.int64)
        q = tl.load(q_ptr + token[:, None] * q_stride + at, mask=mask, other=0.0)
        position = context - queries + query
        # every query of the tile sees all positions before it
        full = (context - queries + start + 1) // TILE * TILE
        seen = context - queries + tl.minimum(start + TILE_Q, queries)
        acc = tl.zeros([M, D_PAD], tl.float32)
        norm = tl.zeros([M], tl.float32)
        highest = tl.full([M], -1.0e30, tl.float32)
        table = table_ptr + row.to(tl.int64) * table_stride
        acc, norm, highest = _walk(
            q,
            acc,
            norm,
            highest,
            position,
            table,
            k_ptr + head * D,
            v_ptr + head * D,
            0,
            full,
            context,
            block_stride,
            slot_stride,
            scale,
            D,
            D_PAD,
            BLOCK_SIZE,
            TILE,
            False,
        )
        acc, norm, highest = _walk(
            q,
            acc,
            norm,
            highest,
            position,
            table,
            k_ptr + head * D,
            v_ptr + head * D,
            full,
            seen,
            context,
            block_stride,
            slot_stride,
            scale,
            D,
            D_PAD,
            BLOCK_SIZE,
            TILE,
            True,
        )
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        tl.store(
            out_ptr + token[:, None] * (K * G * D) + at,
            (acc / tl.maximum(norm, 1.0e-30)[:, None]).to(dtype),
            mask=mask,
        )
