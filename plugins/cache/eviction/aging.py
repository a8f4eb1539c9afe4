"""What evictions with dynamic aging share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headway import Block, Context, KeyEviction


class Aging(KeyEviction):
    """Smallest L + worth(block) first. L, the age, is the value of what was evicted last, so that old worth
    fades.

    The value is fixed when a block is published or hit, not when it becomes a leaf: a parent does not get
    younger by losing a child.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.age = 0.0  # L
        self._value: dict[int, float] = {}  # block id -> L + worth at its last use

    def worth(self, block: Block) -> float:
        raise NotImplementedError

    def key(self, block: Block) -> Any:
        return (self._value[block.id], block.last_access)

    def on_insert(self, block: Block) -> None:
        self._value[block.id] = self.age + self.worth(block)

    def on_hit(self, block: Block) -> None:
        self._value[block.id] = self.age + self.worth(block)

    def on_evict(self, block: Block) -> None:
        del self._value[block.id]

    def candidates(self, n: int) -> Iterator[Block]:
        # what a retention policy drops does not age the rest, so not in on_evict
        for block in super().candidates(n):
            self.age = max(self.age, self._value[block.id])
            yield block
