"""Shortest job first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headway import Context, KeyOrder, Registry, Request, hookimpl


@dataclass
class ShortestFirst(KeyOrder):
    """Fewest predicted output tokens first; a job's length does not shrink while it is served.

    The classic order that minimises mean completion time of a batch on one server without preemption (Smith,
    1956). Its size is the output length alone, as in the SJF baselines of LLM-serving papers. The predictor
    is asked when a request begins to wait.
    """

    may_starve = "short jobs may keep coming before a long one"
    requires: ClassVar[tuple[str, ...]] = ("predictor",)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor = ctx.roles["predictor"]
        self._length: dict[int, float] = {}  # request index -> predicted output tokens

    def key(self, request: Request) -> float:
        return self._length[request.index]

    def on_arrival(self, request: Request, now: float) -> None:
        self._length[request.index] = self._predictor.predict(request).mean
        super().on_arrival(request, now)

    def on_preempt(self, request: Request, now: float) -> None:
        self._length[request.index] = self._predictor.predict(request).mean
        super().on_preempt(request, now)

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._length.pop(request.index, None)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "sjf", ShortestFirst)
