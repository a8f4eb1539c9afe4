"""ARC eviction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headway import Block, Context, Eviction, hookimpl

from .queues import Ghosts, Queue


@dataclass
class AdaptiveReplacement(Eviction):
    """Balances once-used (T1) and reused (T2) blocks by hits on the ghosts of each (ARC; Megiddo and Modha, FAST'03, figure 4).

    c is the pool. One difference to the paper and to libCacheSim: a block is evicted before it is known what takes its place, so a ghost hit
    moves the target p (and the tie |T1| = p on a hit in B2) from the next eviction on, not from the one it causes. Hit ratios stay
    within half a point of libCacheSim's on a Zipf stream.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._c = ctx.num_blocks
        self.p = 0.0  # target size of T1, blocks
        self._t1, self._t2, self._b1, self._b2 = Queue(), Queue(), Ghosts(), Ghosts()

    def on_insert(self, block: Block) -> None:
        t1, t2, b1, b2 = self._t1, self._t2, self._b1, self._b2
        if block.key in b1:
            self.p = min(self.p + max(len(b2) / len(b1), 1.0), self._c)
        elif block.key in b2:
            self.p = max(self.p - max(len(b1) / len(b2), 1.0), 0.0)
        (t2 if b1.take(block.key) or b2.take(block.key) else t1).join(block, block.created)
        b1.trim(self._c - len(t1))
        b2.trim(2 * self._c - len(t1) - len(t2) - len(b1))

    def on_hit(self, block: Block) -> None:
        if block in self._t1:
            self._t1.leave(block)
        self._t2.join(block, block.last_access)

    def on_evictable(self, block: Block) -> None:
        queue = self._t1 if block in self._t1 else self._t2
        queue.join(block, block.last_access)
        queue.ready(block)

    def on_in_use(self, block: Block) -> None:
        (self._t1 if block in self._t1 else self._t2).busy(block)

    def on_evict(self, block: Block) -> None:
        queue, ghosts = (self._t1, self._b1) if block in self._t1 else (self._t2, self._b2)
        queue.leave(block)
        ghosts.add(block.key)

    def candidates(self, n: int) -> Iterator[Block]:
        while True:
            first, then = (self._t1, self._t2) if len(self._t1) > self.p else (self._t2, self._t1)
            block = first.take() or then.take()
            if block is None:
                return
            yield block


@hookimpl
def headway_register(registry):
    registry.add("eviction", "arc", AdaptiveReplacement)
