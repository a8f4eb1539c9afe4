"""Eviction by the reuse probability of a request category."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from math import expm1, log

from headway import Block, BlockHeap, Context, Eviction, Registry, Request, hookimpl, param

Category = tuple[str, int]


class Reuse:
    """Reuse times of one category: exponential (the paper's fit), with the share of uses that is ever
    followed by another."""

    __slots__ = ("uses", "reuses", "seconds", "rate", "scale", "blocks")

    def __init__(self) -> None:
        self.uses = self.reuses = 0
        self.seconds = 0.0
        # log probability of a use within `life` of a block idle for t: scale - rate * t
        self.rate = self.scale = 0.0
        # evictable blocks last used by this category: longest ago first, of one request the deepest first
        self.blocks = BlockHeap()


@dataclass
class WorkloadAware(Eviction):
    """Workload-aware eviction ("KVCache Cache in the Wild", Wang et al., ATC'25, section 5): least likely to
    be used within the cache's life time.

    A category is the request's `tags.category` and turn. Its reuse times are fitted online; reuses after an
    eviction count too, remembered by content. `life` is the mean idle time of evicted blocks. Within a
    category the probability falls with idle time, so an eviction compares one block a category; ties go to
    the deeper block.
    """

    max_turns: int = param(4, min=1, max=1_000_000, doc="later turns are one category")
    smoothing: float = param(0.05, above=0, max=1, doc="weight of the newest sample in `life`")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._capacity = ctx.num_blocks
        self._categories: dict[Category, Reuse] = {}
        # block id -> when and by which category it was used last
        self._used: dict[int, tuple[float, Category]] = {}
        # key of an evicted block -> the same
        self._ghosts: OrderedDict[int, tuple[float, Category]] = OrderedDict()
        self._now = 0.0
        self._life = 0.0  # seconds
        self._fitted = -1.0  # when the categories were fitted last

    def on_admit(self, request: Request, now: float) -> None:
        self._now = now

    def on_insert(self, block: Block) -> None:
        self._use(block, self._ghosts.pop(block.key, None))

    def on_hit(self, block: Block) -> None:
        self._use(block, self._used[block.id])

    def _use(self, block: Block, before: tuple[float, Category] | None) -> None:
        self._now = now = block.last_access_time
        category = (block.tags.category, min(block.tags.turn, self.max_turns))
        self._categories.setdefault(category, Reuse()).uses += 1
        self._used[block.id] = (now, category)
        if before is not None:
            reuse = self._categories[before[1]]
            reuse.reuses += 1
            reuse.seconds += now - before[0]

    def on_evictable(self, block: Block) -> None:
        used, category = self._used[block.id]
        self._categories[category].blocks.push((used, -block.depth), block)

    def on_in_use(self, block: Block) -> None:
        self._categories[self._used[block.id][1]].blocks.discard(block)

    def on_evict(self, block: Block) -> None:
        used = self._used.pop(block.id)
        self._life += self.smoothing * (self._now - used[0] - self._life)
        self._ghosts[block.key] = used
        while len(self._ghosts) > self._capacity:
            self._ghosts.popitem(last=False)

    def _fit(self) -> None:
        """Once a point in time, so that the evictions of one step cost no logarithms."""
        self._fitted = self._now
        life = max(self._life, 1e-9)
        for reuse in self._categories.values():
            # one made-up reuse after `life`, until there are real ones
            reuse.rate = (reuse.reuses + 1) / (reuse.seconds + life)
            reuse.scale = log((reuse.reuses + 1) / (reuse.uses + 2)) + log(-expm1(-reuse.rate * life))

    def candidates(self, n: int) -> Iterator[Block]:
        if self._now > self._fitted:
            self._fit()
        while True:
            best: tuple[float, int, int] | None = None
            chosen: BlockHeap | None = None
            for reuse in self._categories.values():
                if (first := reuse.blocks.peek()) is None:
                    continue
                (used, _), block = first
                rank = (reuse.scale - reuse.rate * (self._now - used), -block.depth, block.last_access)
                if best is None or rank < best:
                    best, chosen = rank, reuse.blocks
            if chosen is None or (block := chosen.pop()) is None:  # type: ignore[assignment]
                return
            yield block


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "workload_aware", WorkloadAware)
