"""Copies: contents of KV blocks that the next step moves, between tiers or within the pool."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import BlockPool
from .errors import InvariantError
from .plan import KVCopy


class Copies:
    """What is asked for since the last launched plan, in order. Who decides on tiers asks here."""

    def __init__(self, pool: BlockPool, tier_blocks: Sequence[int]) -> None:
        """`tier_blocks`: blocks of each tier behind the pool, as the executor has them."""
        self._pool, self._tier_blocks = pool, (pool.num_blocks, *tier_blocks)
        self._asked: list[KVCopy] = []

    def add(self, copy: KVCopy) -> None:
        """Before the next step. Of the pool, a source holds something and a target is held by one request
        alone. Raises InvariantError for another."""
        for tier, block in (copy[:2], copy[2:]):
            if not (0 <= tier < len(self._tier_blocks) and 0 <= block < self._tier_blocks[tier]):
                have = f"the pool and the tiers behind it have {self._tier_blocks} blocks"
                raise InvariantError(f"{copy} names block {block} of tier {tier}, and {have}")
        blocks = self._pool.blocks
        if copy.source_tier == 0:
            source = blocks[copy.source] if copy.source < len(blocks) else None
            if source is None or not (source.ref_count or source.cached):
                raise InvariantError(f"{copy} reads a block of the pool that is free")
        if copy.target_tier == 0:
            target = blocks[copy.target] if copy.target < len(blocks) else None
            if target is None or target.cached or target.ref_count != 1:
                raise InvariantError(
                    f"{copy} writes {target}, which is free, cached or held by others as well"
                )
        self._asked.append(copy)

    def take(self) -> list[KVCopy]:
        """For the plan that is launched next."""
        asked, self._asked = self._asked, []
        return asked

    def clear(self) -> None:
        """Nothing is held any more."""
        self._asked = []
