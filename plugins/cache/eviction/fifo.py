"""FIFO eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway import Block, KeyEviction, Registry, hookimpl


@dataclass
class FirstIn(KeyEviction):
    """The block that was published first, of those that nothing hangs under: leaf-FIFO.

    On chains of prefixes a block goes after those behind it, so a head that is used again and again outlives
    its first tails, and the order is nearer to LRU than that of FIFO over all blocks. With
    `cache.subtree=true` it is that FIFO, and on flat streams, too.
    """

    def key(self, block: Block) -> Any:
        return block.created


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "fifo", FirstIn)
