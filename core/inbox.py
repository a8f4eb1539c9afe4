"""Inbox: what other threads ask of a running engine, and the one thing that wakes its loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from .inputs import Arrival
from .interrupts import interrupts


class Inbox:
    """Arrivals from any thread, in the order of posting. While it is open, the run goes on although nothing
    is to come.

    A SimpleQueue takes what a signal handler or a destructor puts, and who waits for it uses no time.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Arrival | None] = SimpleQueue()  # None: a wake-up
        self._taken: deque[Arrival] = deque()  # by the engine's thread, while it slept
        self.is_open = False

    def open(self) -> None:
        """Before the run: others will post, so it ends no earlier than `close` is called."""
        self.is_open = True

    def close(self) -> None:
        """Nobody posts any more: the run ends when what is there has been served. From any thread."""
        self.is_open = False
        self.wake()

    def post(self, arrival: Arrival) -> None:
        """From any thread."""
        self._queue.put(arrival)

    def wake(self) -> None:
        """Ends the engine's sleep, from any thread: something else than an arrival is to be looked at."""
        self._queue.put(None)

    def __len__(self) -> int:
        """Arrivals and wake-ups that nobody has taken."""
        return self._queue.qsize() + len(self._taken)

    def take(self) -> Iterator[Arrival]:
        """What was posted so far. For the engine's thread, as is `sleep`."""
        while self._taken:
            yield self._taken.popleft()
        while not self._queue.empty():
            if (arrival := self._queue.get_nowait()) is not None:
                yield arrival

    def sleep(self, seconds: float | None) -> None:
        """Until something comes, at most so long; None: however long that takes. Ctrl-C is felt at once,
        since nothing is in flight."""
        if self._taken or (seconds is not None and seconds <= 0):
            return
        with interrupts.sleeping():
            try:
                arrival = self._queue.get(timeout=None if seconds is None else min(seconds, LONGEST))
            except Empty:
                return
        if arrival is not None:
            self._taken.append(arrival)

    def clear(self) -> None:
        """Forgets what was posted."""
        for _ in self.take():
            pass


LONGEST = 1e6  # seconds of one sleep; more than a lock's timeout may be is refused by the system
