"""LRU eviction."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Block, KeyEviction, hookimpl


@dataclass
class LeastRecent(KeyEviction):
    """The block that was touched longest ago (book-keeping and tail-first release order by the core)."""

    def key(self, block: Block):
        return block.last_access


@hookimpl
def headway_register(registry):
    registry.add("eviction", "lru", LeastRecent)
