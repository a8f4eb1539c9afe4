"""Arrivals that are still to come: those of the workload, read lazily, those that finished requests bring
about, and those that other threads post."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any, TypeAlias

from .calls import Calls
from .clock import is_finite
from .errors import WorkloadError
from .inbox import Inbox
from .inputs import Arrival
from .request import Request

_END = object()
#: Closed loop: what arrives after a request has ended.
OnResult: TypeAlias = Callable[[Request, float], Iterable[Arrival]]
_TIME = attrgetter("time")


def checked(arrival: Any, source: str, earliest: float = 0.0) -> Arrival:
    """The arrival, if its time is one. Raises WorkloadError, which names `source`: who made it, and which of
    its arrivals it is."""
    if not isinstance(arrival, Arrival):
        raise WorkloadError(f"{source} is {arrival!r}: expected an Arrival")
    if not is_finite(arrival.time) or arrival.time < earliest:
        name = f" (id {arrival.id!r})" if arrival.id is not None else ""
        raise WorkloadError(
            f"{source}{name} is at {arrival.time} s: expected a finite time of at least {earliest} s"
        )
    return arrival


def in_order(arrivals: Iterable[Arrival], workload: str) -> Iterable[Arrival]:
    """A finite list checked and sorted by time, equal times as they stand in it; a stream as it is, since it
    is checked when it is read."""
    if not isinstance(arrivals, (list, tuple)):
        return arrivals
    return sorted((checked(arrival, _place(workload, i)) for i, arrival in enumerate(arrivals)), key=_TIME)


def _place(workload: str, index: int) -> str:
    return f"{workload}: arrival {index}"


class ArrivalQueue:
    """Arrivals by time, then by the order in which they were added. Of a stream, only the next one is read
    ahead."""

    def __init__(self, calls: Calls, workload: Any) -> None:
        self._calls, self._role = calls, workload
        self.on_result: OnResult | None = None  # of a closed loop
        self.inbox = Inbox()
        self._heap: list[tuple[float, int, Arrival]] = []
        self._serial = 0
        self._stream: Iterator[Arrival] = iter(())
        self._stream_serial: int | None = None  # of the stream's arrival that is in the heap
        self._began = 0.0
        self._num_read = 0  # of the stream
        self._last_time = 0.0  # of the stream, as the workload says it

    def __len__(self) -> int:
        return len(self._heap) + len(self.inbox)

    @property
    def expecting(self) -> bool:
        """Whether anything is to come, as far as anybody knows."""
        return self.inbox.is_open or bool(len(self))

    def add(self, arrival: Arrival) -> None:
        heapq.heappush(self._heap, (arrival.time, self._serial, arrival))
        self._serial += 1

    def stream(self, arrivals: Iterable[Arrival], began: float = 0.0) -> None:
        """The workload, in order of time; may be endless. Its times are seconds since `began` on the run's
        clock."""
        self._stream = self._calls.each(self._role, iter, arrivals)
        self._stream_serial, self._began = None, began
        self._num_read, self._last_time = 0, 0.0

    def follow(self, request: Request, now: float) -> None:
        """Adds what a closed loop asks after this answer; after a refusal, too, since its client goes on."""
        if self.on_result is None:
            return
        source = f"{self._role.plugin_name}: what follows {request.id}"
        for arrival in self._calls.each(self._role, self.on_result, request, now):
            self.add(checked(arrival, source, now))

    def clear(self) -> None:
        """Nothing is to come any more."""
        self._heap.clear()
        self.inbox.clear()
        self._stream, self._stream_serial = iter(()), None
        self.on_result = None

    def until(self, now: float) -> Iterator[Arrival]:
        """Takes out what has arrived. The stream is read on only when the caller is done with an arrival: one
        that raises loses nothing."""
        for posted in self.inbox.take():
            self.add(posted)
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
        if self._stream_serial is not None or (arrival := next(self._stream, _END)) is _END:
            return
        arrival = checked(arrival, _place(self._role.plugin_name, self._num_read))
        if arrival.time < self._last_time:
            raise WorkloadError(
                f"{_place(self._role.plugin_name, self._num_read)} is at {arrival.time} s, after one at "
                f"{self._last_time} s: "
                "a stream yields its arrivals in order of time; sort them, or answer a list, which is sorted "
                "here"
            )
        self._num_read, self._last_time = self._num_read + 1, arrival.time
        self._stream_serial = self._serial
        self.add(replace(arrival, time=self._began + arrival.time) if self._began else arrival)
