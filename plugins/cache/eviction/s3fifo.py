"""S3-FIFO eviction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headway import Block, Context, Eviction, Registry, hookimpl, param

from .queues import Ghosts, Queue


@dataclass
class S3FIFO(Eviction):
    """A small FIFO filters blocks used once, the main FIFO gives used ones another round, ghosts come back to
    main (Yang et al., SOSP'23).

    Agrees with libCacheSim's S3FIFO hit for hit on flat streams; as there, what the small queue has no room
    for goes to main until the pool overflows for the first time. Blocks in use are passed over: they keep
    their place and their count. So are, on chains of prefixes, those that others hang under: there it is
    leaf-S3-FIFO, unless `cache.subtree=true` lets a head take its tails along.
    """

    small_size_ratio: float = param(0.1, min=0, max=1)
    ghost_size_ratio: float = param(0.9, min=0, max=100)
    move_to_main_threshold: int = param(2, min=1, max=1_000_000, doc="hits in the small queue")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._small_size = int(ctx.num_blocks * self.small_size_ratio)
        self._main_size = ctx.num_blocks - self._small_size
        self._ghost_size = int(ctx.num_blocks * self.ghost_size_ratio)
        self._small, self._main, self._ghosts = Queue(), Queue(), Ghosts()
        self._freq: dict[int, int] = {}  # block id -> hits since it entered its queue
        self._serial = 0
        self._filling = True  # the pool has not overflowed yet

    def _enter(self, queue: Queue, block: Block) -> None:
        self._serial += 1
        queue.join(block, self._serial)

    def on_insert(self, block: Block) -> None:
        to_main = self._ghosts.take(block.key) or (self._filling and len(self._small) >= self._small_size)
        self._enter(self._main if to_main else self._small, block)
        self._freq[block.id] = 0
        self._ghosts.trim(self._ghost_size)

    def on_hit(self, block: Block) -> None:
        self._freq[block.id] += 1

    def on_evictable(self, block: Block) -> None:
        (self._small if block in self._small else self._main).ready(block)

    def on_in_use(self, block: Block) -> None:
        (self._small if block in self._small else self._main).busy(block)

    def on_evict(self, block: Block) -> None:
        del self._freq[block.id]
        if block in self._small:
            self._small.leave(block)
            self._ghosts.add(block.key)
        else:
            self._main.leave(block)

    def candidates(self, n: int) -> Iterator[Block]:
        self._filling = False
        while True:
            crowded = len(self._main) > self._main_size or not self._small.num_ready
            block = (
                (self._from_main() or self._from_small())
                if crowded
                else (self._from_small() or self._from_main())
            )
            if block is None:
                return
            yield block

    def _from_small(self) -> Block | None:
        while (block := self._small.take()) is not None and self._freq[
            block.id
        ] >= self.move_to_main_threshold:
            self._small.leave(block)
            self._freq[block.id] = 0
            self._enter(self._main, block)
            self._main.ready(block)
        return block

    def _from_main(self) -> Block | None:
        while (block := self._main.take()) is not None and self._freq[block.id]:
            # a clock of two bits: at most three rounds without a hit
            self._freq[block.id] = min(self._freq[block.id], 3) - 1
            self._enter(self._main, block)
            self._main.ready(block)
        return block


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "s3fifo", S3FIFO)
