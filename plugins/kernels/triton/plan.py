"""Work plans for attention, computed on the device: which row each program starts with.

Lengths never come to the host, so one captured graph serves every length. A row's work is a number of tiles;
`first` is its running sum, and a program finds its row by counting the rows that end at or before its own
first tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import BatchMetadata


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Equal shares of all decode rows' KV tiles: one share and KV head a program."""

    shares: int
    tile: int  # KV tokens
    first: Tensor  # int32 [B + 1]: tiles in the rows before
    row: Tensor  # int32 [shares]: the row that a share begins in
    # int32 [B * K]: programs that have written their part of a (row, KV head); zero between steps
    arrived: Tensor
    partial: Tensor  # float32 [K, shares, 2, G, D]: unnormalised output of a share's first and last row
    stats: Tensor  # float32 [K, shares, 2, 2, G]: their maximum (log2) and sum


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Query tiles of the rows with more than one query."""

    programs: int  # upper bound of the tiles, from the shapes alone
    first: Tensor  # int32 [B + 1]: query tiles in the rows before
    row: Tensor  # int32 [programs]


@triton.jit
def share_of(total, programs):
    """Tiles a program, at least one."""
    return tl.maximum((total + programs - 1) // programs, 1)


@triton.jit
def decode_tiles(cu_q_ptr, len_ptr, row, rows, TILE: tl.constexpr):
    """KV tiles of rows with one query; at least one, so that an empty row's output is written too. Other rows
    have none."""
    mask = row < rows
    queries = tl.load(cu_q_ptr + row + 1, mask=mask, other=0) - tl.load(cu_q_ptr + row, mask=mask, other=0)
    tiles = (tl.load(len_ptr + row, mask=mask, other=0) + TILE - 1) // TILE
    return tl.where(queries == 1, tl.maximum(tiles, 1), 0)


@triton.jit
def prompt_tiles(cu_q_ptr, len_ptr, row, rows, TILE: tl.constexpr):
    """Query tiles of rows with several queries."""
    mask = row < rows
    queries = tl.load(cu_q_ptr + row + 1, mask=mask, other=0) - tl.load(cu_q_ptr + row, mask=mask, other=0)
    return tl.where(queries > 1, (queries + TILE - 1) // TILE, 0)


@triton.jit(do_not_specialize=["rows", "programs", "arrivals"])  # one compilation for every batch
def _plan_kernel(
    cu_q_ptr,
    len_ptr,
    first_ptr,
    row_ptr,
    arrived_ptr,
    rows,
    programs,
    arrivals,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    tiles_of: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ARRIVALS: tl.constexpr,
):
    """Each program of this kernel plans PROGRAMS programs of the attention kernel. SHARED: they cut the line
    of tiles evenly; else each has one tile."""
    lane = tl.arange(0, ROWS)
    total = 0
    for start in range(0, rows, ROWS):
        total += tl.sum(tiles_of(cu_q_ptr, len_ptr, start + lane, rows, TILE))
    number = tl.program_id(0) * PROGRAMS + tl.arange(0, PROGRAMS)
    if SHARED:
        begin = number * share_of(total, programs)
    else:
        begin = number
    row = tl.zeros([PROGRAMS], tl.int32)
    before = 0
    for start in range(0, rows, ROWS):
        tiles = tiles_of(cu_q_ptr, len_ptr, start + lane, rows, TILE)
        end = before + tl.cumsum(tiles, axis=0)
        if tl.program_id(0) == 0:
            tl.store(first_ptr + start + lane, end - tiles, mask=start + lane < rows)
        ended = (end[None, :] <= begin[:, None]) & ((start + lane)[None, :] < rows)
        row += tl.sum(ended.to(tl.int32), axis=1)
        before += tl.sum(tiles)
    if tl.program_id(0) == 0:
        tl.store(first_ptr + rows, total)
    tl.store(row_ptr + number, row, mask=number < programs)
    for start in range(tl.program_id(0) * ARRIVALS, arrivals, ARRIVALS * tl.num_programs(0)):
        at = start + tl.arange(0, ARRIVALS)
        tl.store(arrived_ptr + at, 0, mask=at < arrivals)


def _run(
    batch: BatchMetadata,
    programs: int,
    first: Tensor,
    row: Tensor,
    arrived: Tensor,
    shared: bool,
    tile: int,
    tiles_of: object,
) -> None:
    rows = batch.context_lens.shape[0]
    _plan_kernel[(triton.cdiv(programs, 16),)](
        batch.cu_seqlens_q,
        batch.context_lens,
        first,
        row,
        arrived,
        rows,
        programs,
        arrived.shape[0],
        SHARED=shared,
        TILE=tile,
        tiles_of=tiles_of,
        ROWS=256,
        PROGRAMS=16,
        ARRIVALS=256,
        num_warps=4,
    )


def decode_plan(
    batch: BatchMetadata, shares: int, tile: int, kv_heads: int, group: int, size: int
) -> DecodePlan:
    """shares: how many to cut; tile: KV tokens; group: query heads a KV head; size: head size."""
    rows, device = batch.context_lens.shape[0], batch.context_lens.device
    plan = DecodePlan(
        shares=shares,
        tile=tile,
        first=torch.empty(rows + 1, dtype=torch.int32, device=device),
        row=torch.empty(shares, dtype=torch.int32, device=device),
        arrived=torch.empty(rows * kv_heads, dtype=torch.int32, device=device),
        partial=torch.empty((kv_heads, shares, 2, group, size), dtype=torch.float32, device=device),
        stats=torch.empty((kv_heads, shares, 2, 2, group), dtype=torch.float32, device=device),
    )
    _run(batch, shares, plan.first, plan.row, plan.arrived, True, tile, decode_tiles)
    return plan


def prompt_plan(batch: BatchMetadata, tokens: int, tile: int) -> PromptPlan:
    """tokens: queries in the step; tile: queries."""
    rows, device = batch.context_lens.shape[0], batch.context_lens.device
    programs = tokens // tile + min(rows, tokens)  # every row adds at most one tile that is not full
    plan = PromptPlan(
        programs=programs,
        first=torch.empty(rows + 1, dtype=torch.int32, device=device),
        row=torch.empty(programs, dtype=torch.int32, device=device),
    )
    _run(batch, programs, plan.first, plan.row, plan.first[:0], False, tile, prompt_tiles)
    return plan
