"""LFU eviction."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Block, KeyEviction, hookimpl


@dataclass
class LeastFrequent(KeyEviction):
    """The block with the fewest prefix hits, then the one touched longest ago."""

    def key(self, block: Block):
        return (block.hits, block.last_access)


@hookimpl
def headway_register(registry):
    registry.add("eviction", "lfu", LeastFrequent)
