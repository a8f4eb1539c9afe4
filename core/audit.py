"""The rules of the pool of KV blocks, checked against every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import InvariantError

if TYPE_CHECKING:
    from .blocks import BlockPool


def audit(pool: BlockPool) -> None:
    """The whole pool against its rules: O(total), for tests and the conformance kit. Raises
    InvariantError."""
    used = [b for b in pool.blocks if b.ref_count]
    cached = [b for b in pool.blocks if b.cached]
    free = set(pool.free_blocks)
    if len(free) != len(pool.free_blocks):
        raise InvariantError("a block is on the free list twice")
    idle = [b for b in cached if not b.ref_count]
    if len(used) + len(idle) + pool.num_free != pool.num_blocks:
        raise InvariantError(
            f"allocated {len(used)} + cached {len(idle)} + free {pool.num_free} != total {pool.num_blocks}"
        )
    if len(cached) != pool.num_cached or len(idle) != pool.num_evictable:
        raise InvariantError(
            f"counted {len(cached)} cached and {len(idle)} evictable, kept {pool.num_cached} and "
            f"{pool.num_evictable}"
        )
    children: dict[int, int] = {}
    for block in pool.blocks:
        if block.ref_count < 0:
            raise InvariantError(f"{block} has a negative reference count")
        if block.id in free and (block.ref_count or block.cached):
            raise InvariantError(f"{block} is on the free list")
        if block.cached and block.parent >= 0:
            above = pool.blocks[block.parent]
            children[above.id] = children.get(above.id, 0) + 1
            if not above.cached:
                raise InvariantError(f"{block} is cached but its parent {above} is not")
            if block.ref_count and not above.ref_count:
                raise InvariantError(f"{block} is referenced but its parent {above} is not")
    for block in cached:
        if block.num_children != children.get(block.id, 0):
            raise InvariantError(f"{block} has {children.get(block.id, 0)} cached children")
