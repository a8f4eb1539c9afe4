"""A step's own bookkeeping: what it is told about rows, what decodes read from theirs and what they leave
there. One kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _decode_inputs_kernel(
    row_ptr,
    length_ptr,
    last_ptr,
    table_ptr,
    token_ptr,
    position_ptr,
    end_ptr,
    slot_ptr,
    context_ptr,
    out_ptr,
    width,
    block_size,
    BLOCK: tl.constexpr,
):
    """One row of the batch a program."""
    i = tl.program_id(0)
    row = tl.load(row_ptr + i)
    position = tl.load(length_ptr + row)
    table = table_ptr + row * width
    block = tl.load(table + position // block_size).to(tl.int64)
    tl.store(token_ptr + i, tl.load(last_ptr + row))
    tl.store(position_ptr + i, position)
    tl.store(end_ptr + i, position + 1)
    tl.store(slot_ptr + i, block * block_size + position % block_size)
    tl.store(context_ptr + i, (position + 1).to(tl.int32))
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + i.to(tl.int64) * width + at, tl.load(table + at, mask=at < width), mask=at < width)


def decode_inputs(
    rows: Tensor, lengths: Tensor, last_tokens: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, ...]:
    count, width = rows.shape[0], block_tables.shape[1]
    tokens, positions, ends, slots = torch.empty((4, count), dtype=torch.int64, device=rows.device)
    contexts = torch.empty(count, dtype=torch.int32, device=rows.device)
    tables = torch.empty((count, width), dtype=torch.int32, device=rows.device)
    _decode_inputs_kernel[(count,)](
        rows,
        lengths,
        last_tokens,
        block_tables,
        tokens,
        positions,
        ends,
        slots,
        contexts,
        tables,
        width,
        block_size,
        BLOCK=min(1024, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return tokens, positions, ends, slots, contexts, tables


@triton.jit(do_not_specialize=["count"])
def _advance_kernel(row_ptr, token_ptr, length_ptr, last_ptr, count, padding, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    row = tl.load(row_ptr + i, mask=mask, other=0)
    real = mask & (row != padding)
    tl.store(last_ptr + row, tl.load(token_ptr + i, mask=mask), mask=real)
    tl.store(length_ptr + row, tl.load(length_ptr + row, mask=real) + 1, mask=real)


def advance(rows: Tensor, tokens: Tensor, lengths: Tensor, last_tokens: Tensor) -> None:
    count, padding = rows.shape[0], lengths.shape[0] - 1
    _advance_kernel[(triton.cdiv(count, 128),)](
        rows, tokens, lengths, last_tokens, count, padding, BLOCK=128, num_warps=4
    )


@triton.jit(do_not_specialize=["num_updates", "num_admitted"])
def _update_rows_kernel(
    data_ptr, table_ptr, number_ptr, top_k_ptr, seed_ptr, num_updates, num_admitted, rows, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    updated = i < num_updates
    place = tl.load(data_ptr + i, mask=updated, other=0)
    tl.store(
        table_ptr + place,
        tl.load(data_ptr + num_updates + i, mask=updated, other=0).to(tl.int32),
        mask=updated,
    )
    admitted = i < num_admitted
    entry = data_ptr + 2 * num_updates + 7 * i
    row = tl.load(entry, mask=admitted, other=0)
    for k in tl.static_range(3):
        number = tl.load(entry + 1 + k, mask=admitted, other=0).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(number_ptr + k * rows + row, number, mask=admitted)
    tl.store(top_k_ptr + row, tl.load(entry + 4, mask=admitted, other=0).to(tl.int32), mask=admitted)
    low = tl.load(entry + 5, mask=admitted, other=0) & 0xFFFFFFFF
    high = tl.load(entry + 6, mask=admitted, other=0) << 32
    tl.store(seed_ptr + row, high | low, mask=admitted)


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
    if most := max(num_updates, num_admitted):
        _update_rows_kernel[(triton.cdiv(most, 128),)](
            data,
            block_tables,
            numbers,
            top_k,
            seeds,
            num_updates,
            num_admitted,
            len(seeds),
            BLOCK=128,
            num_warps=4,
        )
