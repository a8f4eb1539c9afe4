"""Segmented LRU eviction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headway import Block, Context, Eviction, Registry, hookimpl, param

from .queues import Queue


@dataclass
class SegmentedLRU(Eviction):
    """A hit moves a block from the probationary to the protected LRU segment (SLRU; Karedla, Love and Wherry,
    IEEE Computer 1994).

    The protected segment holds `protected_ratio` of the pool; its least recent block that is not in use goes
    back to the recent end of the probationary one. SGLang's "slru" is protected_ratio=1: it never goes back.
    """

    protected_ratio: float = param(0.8, min=0, max=1)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._limit = int(ctx.num_blocks * self.protected_ratio)
        self._probation, self._protected = Queue(), Queue()

    def on_insert(self, block: Block) -> None:
        self._probation.join(block, block.last_access)

    def on_hit(self, block: Block) -> None:
        if block in self._probation:
            self._probation.leave(block)
        self._protected.join(block, block.last_access)

    def on_evictable(self, block: Block) -> None:
        queue = self._protected if block in self._protected else self._probation
        queue.join(block, block.last_access)
        queue.ready(block)
        while len(self._protected) > self._limit and (old := self._protected.take()) is not None:
            self._protected.leave(old)
            # Its place is after all that was touched so far, `block` included. It keeps it until it is
            # touched again.
            self._probation.join(old, block.last_access + 0.5)
            self._probation.ready(old)

    def on_in_use(self, block: Block) -> None:
        (self._protected if block in self._protected else self._probation).busy(block)

    def on_evict(self, block: Block) -> None:
        (self._protected if block in self._protected else self._probation).leave(block)

    def candidates(self, n: int) -> Iterator[Block]:
        while (block := self._probation.take() or self._protected.take()) is not None:
            yield block


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "slru", SegmentedLRU)
