"""Highest response ratio next."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, Registry, Request, StepRecord, hookimpl

from .prefix import PrefixOrder


@dataclass
class HighestResponseRatio(PrefixOrder):
    """Highest 1 + waited / needed first (Brinch Hansen, 1971), in prefill tokens as in SGLang: short prompts
    first, but waiting counts.

    needed: prompt tokens that are not cached. waited: prompt tokens that the engine has computed for others
    since the request began to wait, which equals waiting time where throughput is constant. First come first
    served above `fcfs_above` waiting requests; requests that share an uncached prefix with an earlier one go
    last (as SGLang does for both).
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._processed = 0  # prompt tokens computed so far
        self._since: dict[int, int] = {}  # waiting request index -> _processed when it began to wait

    def rank(self, later: bool, cached: int, request: Request) -> tuple[bool, float]:
        return later, -self.ratio(request, cached)

    def ratio(self, request: Request, cached: int) -> float:
        return 1 + (self._processed - self._since[request.index]) / (request.num_tokens - cached)

    def on_arrival(self, request: Request, now: float) -> None:
        super().on_arrival(request, now)
        self._since[request.index] = self._processed

    def on_preempt(self, request: Request, now: float) -> None:
        super().on_preempt(request, now)
        self._since[request.index] = self._processed

    def on_admit(self, request: Request, now: float) -> None:
        super().on_admit(request, now)
        self._since.pop(request.index, None)

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._since.pop(request.index, None)

    def on_step_end(self, record: StepRecord) -> None:
        if record.plan.num_tokens > len(record.plan.requests):  # at least one chunk is longer than a decode
            self._processed += sum(length for length in record.plan.lengths if length > 1)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "hrrn", HighestResponseRatio)
