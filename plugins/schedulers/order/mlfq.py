"""Multi-level feedback queues."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import Context, KeyOrder, Registry, Request, StepRecord, View, hookimpl, param

from .alarms import Alarms

MOST_LEVELS = 64  # that a request skips, or by which a quantum grows: beyond any time that a run can have


@dataclass
class _Place:
    level: int
    serial: int  # within a level, first in, first out
    attained: float = 0.0  # seconds of service in this level


@dataclass
class SkipJoinMLFQ(KeyOrder):
    """FastServe (Wu et al., arXiv 2305.05920, section 4): skip-join MLFQ, for lengths that nobody knows.

    num_queues: levels; None is without end, as in the authors' code. Of a given number the last one holds a
    request for good. quantum, ratio: level i holds a request for quantum * ratio**i seconds of service; 10 ms
    and 2 are theirs. starve_limit: seconds without service after which a request is promoted to the first
    level (alpha in the paper). seconds_per_token: prefill time of a prompt token, where the executor has no
    cost model; 0 lets everybody join the first level.

    A request skips to the first level whose quantum covers its prefill, and is demoted when its service in a
    level exceeds the quantum. Service is the duration of the steps that held it. Use scheduler=preemptive for
    the paper's preemption at every iteration. Not here: proactive swapping. A preempted request recomputes
    its KV, and that time counts as service.
    """

    num_queues: int | None = param(None, min=1, max=64)
    quantum: float = param(0.01, min=1e-9, max=1e9, unit="seconds")
    ratio: float = param(2.0, min=1, max=1000)
    starve_limit: float = param(3.0, above=0, max=1e9, unit="seconds")
    seconds_per_token: float = param(0.0, min=0, max=1e6, unit="seconds")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._cost = ctx.cost_model
        self._places: dict[int, _Place] = {}
        self._starving, self._serial = Alarms(), 0

    def held_for(self, level: int) -> float:
        """Seconds of service that a request gets in a level."""
        if self.num_queues is not None and level >= self.num_queues - 1:
            return float("inf")
        return self.quantum * self.ratio ** min(level, MOST_LEVELS)

    def level(self, request: Request) -> int:
        """0 is the first queue."""
        return self._places[request.index].level

    def key(self, request: Request) -> tuple[int, int]:
        place = self._places[request.index]
        return place.level, place.serial

    def order(self, view: View) -> Iterable[Request]:
        for request in self._starving.pop_due(view.now):
            self._enter(request, 0)
            self.rekey(request)
        return super().order(view)

    def on_arrival(self, request: Request, now: float) -> None:
        tokens = request.num_prompt_tokens
        first = self._cost.step_time([0], [tokens]) if self._cost else tokens * self.seconds_per_token
        level = 0
        while first > self.held_for(level) and level < MOST_LEVELS:
            level += 1
        self._enter(request, level)
        super().on_arrival(request, now)
        self._starving.set(request, now + self.starve_limit)

    def on_preempt(self, request: Request, now: float) -> None:
        super().on_preempt(request, now)
        self._starving.set(request, now + self.starve_limit)

    def on_admit(self, request: Request, now: float) -> None:
        super().on_admit(request, now)
        self._starving.clear(request)

    def on_step_end(self, record: StepRecord) -> None:
        spent = record.end - record.start
        for request in record.plan.requests:
            if (place := self._places.get(request.index)) is not None:
                place.attained += spent
                if place.attained > self.held_for(place.level):
                    self._enter(request, place.level + 1)
                    self.rekey(request)

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._starving.clear(request)
        self._places.pop(request.index, None)

    def _enter(self, request: Request, level: int) -> None:
        self._serial += 1
        self._places[request.index] = _Place(level, self._serial)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "mlfq", SkipJoinMLFQ)
