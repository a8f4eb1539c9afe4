"""The two clocks. The engine reads `now()` once per loop turn; everything else takes the time it is handed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol


def is_finite(value: Any) -> bool:
    """Whether it is a number that a time or a prediction can be: neither NaN nor infinite."""
    return isinstance(value, (float, int, Real)) and math.isfinite(value)


class Clock(Protocol):
    """What the engine asks of an executor's clock."""

    def now(self) -> float:
        """Seconds since the run began."""

    def advance_to(self, t: float) -> None:
        """A step ended at t. Virtual time jumps there; wall time is there already."""

    def wait_until(self, t: float) -> None:
        """Nothing to do before t."""


class VirtualClock:
    """Discrete-event time: moves only when told to, never backwards."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance_to(self, t: float) -> None:
        if t > self._now:
            self._now = t

    wait_until = advance_to


class VirtualServer:
    """What does one thing after another in virtual time: each begins when it is handed over, or when the one before it ends."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.free_at = 0.0

    def serve(self, seconds: float) -> tuple[float, float]:
        """When it begins and when it ends."""
        begin = max(self._clock.now(), self.free_at)
        self.free_at = begin + seconds
        return begin, self.free_at


class WallClock:
    """Monotonic time since the first reading, so that loading weights and opening trackers is no part of a run."""

    def __init__(self) -> None:
        self._start: float | None = None

    def now(self) -> float:
        t = time.perf_counter()
        if self._start is None:
            self._start = t
        return t - self._start

    def advance_to(self, t: float) -> None:
        pass

    def wait_until(self, t: float) -> None:
        # Short naps, so that Ctrl-C is felt at once.
        while (left := t - self.now()) > 0:
            time.sleep(min(left, 0.05))


class RecordingClock:
    """Wraps a clock and keeps every reading: played back by ReplayClock, a run repeats decision for decision."""

    def __init__(self, inner: Clock) -> None:
        self.inner = inner
        self.readings: list[float] = []
        self.advance_to, self.wait_until = inner.advance_to, inner.wait_until

    def now(self) -> float:
        t = self.inner.now()
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

    wait_until = advance_to
