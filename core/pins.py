"""Pins: cached blocks that a Retention policy keeps past the end of their request."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from .blocks import BlockPool
from .request import Request


class Pins:
    """What `Retention.retain` is handed (KVControl). Every pin ends at a time, at its session's end, or under
    memory pressure."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._dropped: set[int] = set()  # index of requests whose blocks are forgotten once they are released
        self._heap: list[tuple[float, int, Request, tuple[int, ...]]] = []  # by expiry
        self._serial = 0

    def __len__(self) -> int:
        return len(self._heap)

    def pin(self, request: Request, until: float) -> None:
        """Keeps the request's cached blocks until that time (seconds on the run's clock), or until memory
        runs out."""
        if not isinstance(until, (float, int)) or math.isnan(until):
            raise ValueError(
                f"pin(until={until!r}): expected seconds on the run's clock; inf is until memory runs out"
            )
        held = self._pool.pin(request.canonical_table)
        if held:
            self._serial += 1
            heapq.heappush(self._heap, (until, self._serial, request, held))

    def unpin(self, session: str) -> None:
        """Gives up every pin of a session."""
        ours = [p for p in self._heap if p[2].tags.session == session]
        if ours:
            self._heap = [p for p in self._heap if p[2].tags.session != session]
            heapq.heapify(self._heap)
            for _, _, request, held in ours:
                self._pool.unpin(held, request.tags)

    def drop(self, request: Request) -> None:
        """Forgets the request's blocks where nobody else holds them: at once, or when the last step in flight
        that uses them is back."""
        self._dropped.add(request.index)

    def take_dropped(self, request: Request) -> bool:
        """Whether its retention policy said so; asked once, when its blocks are released."""
        dropped = request.index in self._dropped
        self._dropped.discard(request.index)
        return dropped

    @property
    def held(self) -> Iterator[int]:
        """Every pinned block, once per pin."""
        return (block for _, _, _, blocks in self._heap for block in blocks)

    def expire(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            self.give_up_soonest()

    def clear(self) -> None:
        """Forgets every pin, with the pool that they were on."""
        self._heap.clear()
        self._dropped.clear()

    def give_up_soonest(self) -> bool:
        """Ends the pin that would end first; False when there is none."""
        if not self._heap:
            return False
        _, _, request, held = heapq.heappop(self._heap)
        self._pool.unpin(held, request.tags)
        return True
