"""Arrivals that are still to come: those of the workload, read lazily, and those that finished requests bring about."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from .request import Arrival


class Coming:
    """Arrivals by time, then by the order in which they were added. Of a stream, only the next one is read ahead."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Arrival]] = []
        self._serial = 0
        self._stream: Iterator[Arrival] = iter(())
        self._stream_serial: int | None = None  # of the stream's arrival that is in the heap

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, arrival: Arrival) -> None:
        heapq.heappush(self._heap, (arrival.time, self._serial, arrival))
        self._serial += 1

    def stream(self, arrivals: Iterable[Arrival]) -> None:
        """The workload, in order of time; may be endless."""
        self._stream = iter(arrivals)

    def until(self, now: float) -> Iterator[Arrival]:
        """Takes out what has arrived. The stream is read on only when the caller is done with an arrival: one that raises
        loses nothing."""
        self._read_ahead()
        while self._heap and self._heap[0][0] <= now:
            _, serial, arrival = heapq.heappop(self._heap)
            if serial == self._stream_serial:
                self._stream_serial = None
            yield arrival
            self._read_ahead()

    @property
    def next_time(self) -> float | None:
        """Seconds on the run's clock; None when nothing is known to come."""
        return self._heap[0][0] if self._heap else None

    def _read_ahead(self) -> None:
        if self._stream_serial is None and (arrival := next(self._stream, None)) is not None:
            self._stream_serial = self._serial
            self.add(arrival)
