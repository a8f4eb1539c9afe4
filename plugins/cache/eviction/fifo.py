"""FIFO eviction."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Block, KeyEviction, hookimpl


@dataclass
class FirstIn(KeyEviction):
    """The block that was published first."""

    def key(self, block: Block):
        return block.created


@hookimpl
def headway_register(registry):
    registry.add("eviction", "fifo", FirstIn)
