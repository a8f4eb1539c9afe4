"""2Q eviction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headway import Block, Context, Eviction, Registry, hookimpl, param

from .queues import Ghosts, Queue


@dataclass
class TwoQueues(Eviction):
    """New blocks go through the FIFO A1in; only those asked for again from its ghosts A1out enter the LRU Am
    (2Q; Johnson and Shasha, VLDB'94).

    `kin` and `kout` are the paper's Kin and Kout as shares of the pool. Agrees with libCacheSim's TwoQ hit
    for hit on flat streams. On chains of prefixes it is leaf-2Q: of each queue the first that nothing hangs
    under goes. With `cache.subtree=true` the first of all that nobody uses does, and takes its tails along.
    """

    kin: float = param(0.25, min=0, max=1)
    kout: float = param(0.5, min=0, max=100)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._kin, self._kout = int(ctx.num_blocks * self.kin), int(ctx.num_blocks * self.kout)
        self._a1in, self._am, self._a1out = Queue(), Queue(), Ghosts()

    def on_insert(self, block: Block) -> None:
        queue = self._am if self._a1out.take(block.key) else self._a1in
        queue.join(block, block.created)
        self._a1out.trim(self._kout)

    def on_evictable(self, block: Block) -> None:
        if block in self._am:
            self._am.join(block, block.last_access)
            self._am.ready(block)
        else:
            self._a1in.ready(block)

    def on_in_use(self, block: Block) -> None:
        (self._am if block in self._am else self._a1in).busy(block)

    def on_evict(self, block: Block) -> None:
        if block in self._a1in:
            self._a1in.leave(block)
            self._a1out.add(block.key)
        else:
            self._am.leave(block)

    def candidates(self, n: int) -> Iterator[Block]:
        while True:
            first, then = (self._a1in, self._am) if len(self._a1in) > self._kin else (self._am, self._a1in)
            block = first.take() or then.take()
            if block is None:
                return
            yield block


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "two_q", TwoQueues)
