"""What bench_parallel.py reads while a run goes on: how long stages compute, and a profile of a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class Window:
    """Reads stage times between two steps of a run."""

    def __init__(self, read: Any, first: int, last: int) -> None:
        self._read, self._first, self._last, self._step = read, first, last, 0
        self.result: list[tuple[float, float]] = []

    def __call__(self, record: Any) -> None:
        self._step += 1
        if self._step == self._first:
            self._read()
        elif self._step == self._last:
            self.result = self._read()


COMMUNICATION = ("nccl", "all_reduce", "shot", "barrier", "memcpy")


class Profile:
    """Kernel and copy time of the driver's rank over a few steps."""

    def __init__(
        self, matches: Callable[[Any], bool], first: int, steps: int, report: Callable[..., None]
    ) -> None:
        import torch

        self._matches, self._first, self._steps, self._report, self._seen = matches, first, steps, report, 0
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def __call__(self, record: Any) -> None:
        if not self._matches(record):
            return
        self._seen += 1
        if self._seen == self._first:
            self._profiler.start()
        elif self._seen == self._first + self._steps:
            import torch

            torch.cuda.synchronize()
            self._profiler.stop()
            self._print()

    def _print(self) -> None:
        from torch.autograd import DeviceType

        events = [e for e in self._profiler.events() if e.device_type == DeviceType.CUDA]
        # communication, everything else: (begin, end) in us
        spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        kernels: dict[str, float] = {}
        for event in events:
            talks = any(word in event.name.lower() for word in COMMUNICATION)
            spans[talks].append((event.time_range.start, event.time_range.end))
            kernels[event.name] = kernels.get(event.name, 0) + event.time_range.end - event.time_range.start
        if not events:
            return self._report(problem="the profiler saw no kernel")
        everything = [*spans[True], *spans[False]]
        talk, rest, both = (
            covered(some) / self._steps / 1e3 for some in (spans[True], spans[False], everything)
        )
        wall = (max(end for _, end in everything) - min(begin for begin, _ in everything)) / self._steps / 1e3
        top = sorted(kernels.items(), key=lambda item: -item[1])[:12]
        total = sum(kernels.values()) / self._steps / 1e3
        self._report(
            wall_ms=wall,
            kernel_ms=total,
            busy_ms=both,
            communication_ms=talk,
            hidden_ms=talk + rest - both,
            communication_share=talk / both,
            exposed_share=(both - rest) / wall,
            top={name[:90]: round(t / self._steps / 1e3, 3) for name, t in top},
        )


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    length, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length
