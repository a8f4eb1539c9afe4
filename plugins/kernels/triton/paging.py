"""Paged KV: from a position in a row to its physical block."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of(table, start, context, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """int32: the physical blocks of positions start:start + TILE, start a multiple of TILE. One value where a
    tile lies inside a block, else one a position; 0 past the context, where the table is not read."""
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + start // BLOCK_SIZE, mask=start < context, other=0)
    else:
        position = start + tl.arange(0, TILE)
        block = tl.load(table + position // BLOCK_SIZE, mask=position < context, other=0)
    return block
