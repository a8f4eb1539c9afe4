"""LFU eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway import Block, KeyEviction, Registry, hookimpl


@dataclass
class LeastFrequent(KeyEviction):
    """The block with the fewest prefix hits, then the one touched longest ago."""

    def key(self, block: Block) -> Any:
        return (block.hits, block.last_access)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "lfu", LeastFrequent)
