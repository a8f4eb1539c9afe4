"""SIEVE eviction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headway import Block, Context, Eviction, Registry, hookimpl

from .queues import Queue


@dataclass
class Sieve(Eviction):
    """A hand walks from old to new over a FIFO, spares each visited block once and evicts the first that is
    not (Zhang et al., NSDI'24).

    Agrees with libCacheSim's Sieve hit for hit on flat streams. On chains of prefixes it is leaf-SIEVE: the
    hand sees only blocks that nothing hangs under, so a head is not judged before its tails are gone; with
    `cache.subtree=true` it sees all that nobody uses, and a head takes its tails along. The queue is kept as
    what lies ahead of the hand and what lies behind it, so that blocks in use, which the hand must not touch,
    are never walked over.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._ahead, self._behind = Queue(), Queue()
        self._hand = 0  # `created` of the block it passed last; 0: at the old end
        self._visited: dict[int, bool] = {}

    def on_insert(self, block: Block) -> None:
        self._visited[block.id] = False

    def on_hit(self, block: Block) -> None:
        self._visited[block.id] = True

    def on_evictable(self, block: Block) -> None:
        self._place(self._ahead if block.created > self._hand else self._behind, block)

    def _place(self, queue: Queue, block: Block) -> None:
        queue.join(block, block.created)
        queue.ready(block)

    def on_in_use(self, block: Block) -> None:
        queue = self._ahead if block in self._ahead else self._behind
        queue.busy(block)
        queue.leave(block)

    def on_evict(self, block: Block) -> None:
        del self._visited[block.id]

    def candidates(self, n: int) -> Iterator[Block]:
        while self._ahead.num_ready or self._behind.num_ready:
            if not self._ahead.num_ready:
                self._wrap()
            block = self._ahead.take()
            assert block is not None
            self._ahead.leave(block)
            self._hand = block.created
            if self._visited[block.id]:
                self._visited[block.id] = False
                self._place(self._behind, block)
                continue
            if not self._ahead.num_ready:
                self._wrap()  # now, so that the block that takes its place is not the next victim
            yield block

    def _wrap(self) -> None:
        self._ahead, self._behind, self._hand = self._behind, self._ahead, 0


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "sieve", Sieve)
