"""LRU eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway import Block, KeyEviction, Registry, hookimpl


@dataclass
class LeastRecent(KeyEviction):
    """The block that was touched longest ago (book-keeping and tail-first release order by the core)."""

    def key(self, block: Block) -> Any:
        return block.last_access


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "lru", LeastRecent)
