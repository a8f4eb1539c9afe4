"""MRU eviction."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Block, KeyEviction, hookimpl


@dataclass
class MostRecent(KeyEviction):
    """The leaf that was touched last: best for a loop over more than fits (Chou and DeWitt, VLDB'85), a bad baseline elsewhere."""

    def key(self, block: Block):
        return -block.last_access


@hookimpl
def headway_register(registry):
    registry.add("eviction", "mru", MostRecent)
