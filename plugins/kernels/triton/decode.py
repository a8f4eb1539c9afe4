"""Split-KV decode attention for grouped queries over paged KV (flash-decoding), balanced whatever the lengths
are.

The KV tiles of all rows form one line that is cut into equal shares; a program walks one share for one KV
head, row by row (the stream-K idea applied to split KV). A row inside one share is written directly; a row
cut by a border leaves partial results, and the last program to arrive at it combines them, in a fixed order.
The query heads of a group fill the rows of one `tl.dot`, so a K or V tile is read once. Neighbouring programs
walk the same tokens of neighbouring heads, which lie side by side in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import fetch, release, wait
from .paging import block_of
from .plan import share_of


@triton.jit(do_not_specialize=["rows"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    len_ptr,
    cu_q_ptr,
    first_ptr,
    row_ptr,
    arrived_ptr,
    partial_ptr,
    stats_ptr,
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
    PARTS: tl.constexpr,
    G_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """q [T, K * G, D], out the same; caches [blocks, BLOCK_SIZE, K, D]. scale includes log2(e). M >= G: rows
    of the products."""
    release(PDL)
    head, number, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    total = tl.load(first_ptr + rows)
    share = share_of(total, shares)
    tile = number * share  # on the line
    end = tl.minimum(tile + share, total)
    row = tl.load(row_ptr + number)
    head_of_group = tl.arange(0, M)
    dim = tl.arange(0, D_PAD)
    q_mask = (head_of_group[:, None] < G) & (dim[None, :] < D)
    # plan, lengths and tables are older than the kernel before this one; only q and the newest K and V are
    # its work
    if PDL:
        if tile < end:
            context = tl.load(len_ptr + row)
            table = table_ptr + row.to(tl.int64) * table_stride
            LINES: tl.constexpr = (D_PAD + 63) // 64  # of 128 bytes in half precision
            line = tl.arange(0, LINES) * 64
            start = (tile - tl.load(first_ptr + row)) * TILE
            for _ in range(2):
                position = start + tl.arange(0, TILE)
                block = block_of(table, start, context, BLOCK_SIZE, TILE)
                offset = block.to(tl.int64) * block_stride + (position % BLOCK_SIZE) * slot_stride + head * D
                fetch(k_ptr + offset[:, None] + line[None, :])
                fetch(v_ptr + offset[:, None] + line[None, :])
                start += TILE
    wait(PDL)
    while tile < end:
        begin = tl.load(first_ptr + row)  # where the row begins and ends on the line
        finish = tl.load(first_ptr + row + 1)
        stop = tl.minimum(end, finish)
        context = tl.load(len_ptr + row)
        token = tl.load(cu_q_ptr + row).to(tl.int64)
        at = (head * G + head_of_group[:, None]) * D + dim[None, :]
        q = tl.load(q_ptr + token * q_stride + at, mask=q_mask, other=0.0)
        highest = tl.full([M], -1.0e30, tl.float32)  # finite: an empty row must not give NaN
        norm = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D_PAD], tl.float32)
        table = table_ptr + row.to(tl.int64) * table_stride
        # The next tile's block is looked up one step ahead: then the copies of K and V depend on no load of
        # their own step, and the compiler keeps several tiles in flight.
        start = (tile - begin) * TILE
        block = block_of(table, start, context, BLOCK_SIZE, TILE)
        for _ in range(tile - begin, stop - begin):
            position = start + tl.arange(0, TILE)
            valid = position < context
            offset = block.to(tl.int64) * block_stride + (position % BLOCK_SIZE) * slot_stride + head * D
            # What lies past the context may be anything, NaN included: it is never loaded.
            mask = valid[:, None] & (dim[None, :] < D)
            k = tl.load(k_ptr + offset[:, None] + dim[None, :], mask=mask, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            score = tl.where(valid[None, :], score, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, axis=1) * scale)
            weight = tl.exp2(score * scale - higher[:, None])
            shrink = tl.exp2(highest - higher)
            norm = norm * shrink + tl.sum(weight, axis=1)
            highest = higher
            v = tl.load(v_ptr + offset[:, None] + dim[None, :], mask=mask, other=0.0)
            acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            start += TILE
            block = block_of(table, start, context, BLOCK_SIZE, TILE)
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        out = out_ptr + token * (K * G * D)
        first_share = begin // share
        last_share = (finish - 1) // share
        if first_share == last_share:
            tl.store(out + at, (acc / tl.maximum(norm, 1.0e-30)[:, None]).to(dtype), mask=q_mask)
        else:
            slot = (head * shares + number) * 2 + (begin > number * share).to(tl.int32)
            tl.store(partial_ptr + slot * G * D + head_of_group[:, None] * D + dim[None, :], acc, mask=q_mask)
            tl.store(stats_ptr + slot * 2 * G + head_of_group, highest, mask=head_of_group < G)
            tl.store(stats_ptr + slot * 2 * G + G + head_of_group, norm, mask=head_of_group < G)
            tl.debug_barrier()  # every thread's part is written before one thread says so
            arrived = tl.atomic_add(arrived_ptr + row * K + head, 1, sem="acq_rel")
            if arrived == last_share - first_share:
                tl.store(arrived_ptr + row * K + head, 0)
                skipped = head * shares * 2
                _combine(
                    partial_ptr + skipped * G * D,
                    stats_ptr + skipped * 2 * G,
                    out + head * G * D,
                    first_share,
                    last_share,
                    (begin > first_share * share).to(tl.int32),
                    G,
                    D,
                    D_PAD,
                    PARTS,
                    G_PAD,
                )
        tile = stop
        while (tile >= tl.load(first_ptr + row + 1)) & (tile < end):
            row += 1


@triton.jit
def _combine(
    partial_ptr,
    stats_ptr,
    out_ptr,
    first,
    last,
    late,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    G_PAD: tl.constexpr,
):
    """One row's parts of one KV head, in the order of their shares. late: 1 where the row begins inside its
    first share."""
    head = tl.arange(0, G_PAD)
    dim = tl.arange(0, D_PAD)
    mask = (head[:, None] < G) & (dim[None, :] < D)
    highest = tl.full([G_PAD], -1.0e30, tl.float32)
    norm = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, D_PAD], tl.float32)
    for start in range(first, last + 1, PARTS):
        number = start + tl.arange(0, PARTS)
        slot = number * 2 + tl.where(number == first, late, 0)
        there = (number <= last)[:, None] & (head < G)[None, :]  # [PARTS, G_PAD]
        at = stats_ptr + slot[:, None] * 2 * G + head[None, :]
        # .cg: past the first-level cache, which is not coherent between multiprocessors
        part_highest = tl.load(at, mask=there, other=-1.0e30, cache_modifier=".cg")
        part_norm = tl.load(at + G, mask=there, other=0.0, cache_modifier=".cg")
        part = tl.load(
            partial_ptr + slot[:, None, None] * G * D + head[None, :, None] * D + dim[None, None, :],
            mask=there[:, :, None] & (dim < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(highest, tl.max(part_highest, axis=0))
        shrink = tl.exp2(highest - higher)
        scale = tl.exp2(part_highest - higher[None, :])
        norm = norm * shrink + tl.sum(part_norm * scale, axis=0)
        acc = acc * shrink[:, None] + tl.sum(part * scale[:, :, None], axis=0)
        highest = higher
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(
        out_ptr + head[:, None] * D + dim[None, :],
        (acc / tl.maximum(norm, 1.0e-30)[:, None]).to(dtype),
        mask=mask,
    )
