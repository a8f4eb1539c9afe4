"""Shortest job first."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, KeyOrder, Request, hookimpl


@dataclass
class ShortestFirst(KeyOrder):
    """Fewest predicted output tokens first; a job's length does not shrink while it is served.

    The classic order that minimises mean completion time of a batch on one server without preemption (Smith, 1956). Its size is the
    output length alone, as in the SJF baselines of LLM-serving papers. Choose the predictor with predictor=oracle, noisy or history.
    """

    requires = ("predictor",)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor = ctx.roles["predictor"]

    def key(self, request: Request) -> float:
        return self._predictor.predict(request).mean


@hookimpl
def headway_register(registry):
    registry.add("order", "sjf", ShortestFirst)
