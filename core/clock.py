"""The clocks: wall, virtual, recorded and replayed time. The engine reads `now()` once per loop turn;
everything else takes the time it is handed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

from .inbox import Inbox


def is_finite(value: Any) -> bool:
    """Whether it is a number that a time or a prediction can be: neither NaN nor infinite."""
    return isinstance(value, (float, int, Real)) and math.isfinite(value)


class Clock(Protocol):
    """What the engine asks of an executor's clock."""

    def now(self) -> float:
        """Seconds since the run began."""

    def advance_to(self, t: float) -> None:
        """A step ended at t. Virtual time jumps there; wall time is there already."""

    def wait_until(self, t: float, inbox: Inbox) -> None:
        """Nothing to do before t, or before something comes into the inbox."""


class VirtualClock:
    """Discrete-event time: moves only when told to, never backwards."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance_to(self, t: float) -> None:
        if t > self._now:
            self._now = t

    def wait_until(self, t: float, inbox: Inbox) -> None:
        """Time goes by at once, if nobody has asked for anything meanwhile."""
        if not len(inbox):
            self.advance_to(t)


class VirtualServer:
    """What does one thing after another in virtual time: each begins when it is handed over, or when the one
    before it ends."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.free_at = 0.0

    def serve(self, seconds: float) -> tuple[float, float]:
        """When it begins and when it ends."""
        begin = max(self._clock.now(), self.free_at)
        self.free_at = begin + seconds
        return begin, self.free_at


class WallClock:
    """Monotonic time since the first reading, so that loading weights and opening trackers is no part of a
    run."""

    def __init__(self) -> None:
        self._start: float | None = None

    def now(self) -> float:
        t = time.perf_counter()
        if self._start is None:
            self._start = t
        return t - self._start

    def advance_to(self, t: float) -> None:
        pass

    def wait_until(self, t: float, inbox: Inbox) -> None:
        inbox.sleep(t - self.now())


class RecordingClock:
    """Wraps a clock. Asked to `record`, it keeps every reading: played back by ReplayClock, a run repeats
    decision for decision."""

    def __init__(self, inner: Clock) -> None:
        self.inner = inner
        self.begin()
        self.advance_to, self.wait_until = inner.advance_to, inner.wait_until

    def begin(self) -> None:
        """A new run: nothing is kept, since a server's run may have no end."""
        self.readings: list[float] = []
        self._records = False

    def record(self) -> None:
        """Keeps what is read from now on, until the next run begins."""
        self._records = True

    def keep(self, readings: Sequence[float]) -> None:
        """What somebody else has read of the inner clock: what stands in for the engine."""
        if self._records:
            self.readings.extend(readings)

    def now(self) -> float:
        t = self.inner.now()
        if self._records:
            self.readings.append(t)
        return t


class ReplayClock:
    """Returns recorded readings in order; past the end it stays at the last one."""

    def __init__(self, readings: Sequence[float]) -> None:
        self._readings, self._next = readings, 0

    def now(self) -> float:
        i = min(self._next, len(self._readings) - 1)
        self._next += 1
        return self._readings[i]

    def advance_to(self, t: float) -> None:
        pass

    def wait_until(self, t: float, inbox: Inbox) -> None:
        """The next reading is what it was when the recorded run woke."""
