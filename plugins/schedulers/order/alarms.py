"""Requests that have waited too long."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from headway import Request


class Alarms:
    """One alarm a waiting request, at the moment (in any unit that grows) at which it has waited too long.
    O(log n) a change."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Request]] = []
        self._live: dict[int, int] = {}  # request index -> serial of its alarm; other heap entries are stale
        self._serial = 0

    def set(self, request: Request, moment: float) -> None:
        self._serial += 1
        self._live[request.index] = self._serial
        heapq.heappush(self._heap, (moment, request.index, self._serial, request))

    def clear(self, request: Request) -> None:
        self._live.pop(request.index, None)

    def pop_due(self, now: float) -> Iterator[Request]:
        """The requests whose moment has come, earliest first; each is answered once."""
        while self._heap and self._heap[0][0] <= now:
            _, index, serial, request = heapq.heappop(self._heap)
            if self._live.get(index) == serial:
                del self._live[index]
                yield request
