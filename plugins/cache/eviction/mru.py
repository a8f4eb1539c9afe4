"""MRU eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway import Block, KeyEviction, Registry, hookimpl


@dataclass
class MostRecent(KeyEviction):
    """The leaf that was touched last: best for a loop over more than fits (Chou and DeWitt, VLDB'85), a bad
    baseline elsewhere."""

    def key(self, block: Block) -> Any:
        return -block.last_access


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "mru", MostRecent)
