"""A decode step's own bookkeeping: what it reads from the rows of its batch, and what it leaves in them. One kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _decode_inputs_kernel(
    row_ptr, length_ptr, last_ptr, table_ptr, token_ptr, position_ptr, end_ptr, slot_ptr, context_ptr, out_ptr, width, block_size, BLOCK: tl.constexpr
):  # fmt: skip
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


def decode_inputs(rows: Tensor, lengths: Tensor, last_tokens: Tensor, block_tables: Tensor, block_size: int) -> tuple[Tensor, ...]:
    count, width = rows.shape[0], block_tables.shape[1]
    tokens, positions, ends, slots = torch.empty((4, count), dtype=torch.int64, device=rows.device)
    contexts = torch.empty(count, dtype=torch.int32, device=rows.device)
    tables = torch.empty((count, width), dtype=torch.int32, device=rows.device)
    _decode_inputs_kernel[(count,)](
        rows, lengths, last_tokens, block_tables, tokens, positions, ends, slots, contexts, tables, width, block_size,
        BLOCK=min(1024, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
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
    _advance_kernel[(triton.cdiv(count, 128),)](rows, tokens, lengths, last_tokens, count, padding, BLOCK=128, num_warps=4)
