"""Least slack first."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, Registry, Request, hookimpl

from .edf import NEVER, deadline
from .sjf import ShortestFirst


@dataclass
class LeastSlack(ShortestFirst):
    """Least slack first: deadline - now - predicted work left (least laxity first; Mok, MIT 1983).

    Deadlines are those of order=edf. Work left is the prefill, and for an e2el target one decode step a
    predicted output token, each alone in its step by the executor's cost model: a lower bound, since a batch
    shares its steps. `now` is the same for all and cancels; while requests wait, nothing else changes.
    """

    may_starve = "a request without a target waits for all that have one"
    requires = ("predictor", "step_time", "slo")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        assert ctx.cost_model is not None  # since it requires step_time
        self._cost = ctx.cost_model
        # request index -> (prefill, a decode), as of when it began to wait
        self._seconds: dict[int, tuple[float, float]] = {}

    def key(self, request: Request) -> float:
        due = deadline(request)
        if due == NEVER:
            return NEVER
        prefill, decode = self._seconds[request.index]
        work = prefill if request.num_new_tokens > 1 else decode
        if request.slo.e2el is not None:
            work += max(0.0, self._length[request.index] - request.num_output_tokens - 1) * decode
        return due - work

    def on_arrival(self, request: Request, now: float) -> None:
        self._estimate(request)
        super().on_arrival(request, now)

    def on_preempt(self, request: Request, now: float) -> None:
        self._estimate(request)
        super().on_preempt(request, now)

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._seconds.pop(request.index, None)

    def _estimate(self, request: Request) -> None:
        prefill, decode = (
            self._cost.step_time([0], [request.num_tokens]),
            self._cost.step_time([request.num_tokens], [1]),
        )
        self._seconds[request.index] = prefill, decode


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "least_slack", LeastSlack)
