"""Least slack first."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, KeyOrder, Request, hookimpl

from .edf import NEVER, deadline


@dataclass
class LeastSlack(KeyOrder):
    """Least slack first: deadline - now - predicted work left (least laxity first; Mok, MIT 1983).

    Deadlines are those of order=edf. Work left is the prompt's prefill time, and for an e2el target one decode step a predicted output token,
    each alone in its step by the executor's cost model: a lower bound, since a batch shares its steps. While requests wait,
    all slacks shrink alike, so `now` cancels and the key stands until a request is preempted.
    """

    requires = ("predictor", "step_time")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor, self._cost = ctx.roles["predictor"], ctx.cost_model

    def key(self, request: Request) -> float:
        due = deadline(request)
        if due == NEVER:
            return NEVER
        work = self._cost.step_time([0], [request.num_tokens])
        if request.slo.e2el is not None:
            left = max(1.0, self._predictor.predict(request).mean - request.num_output_tokens)
            work += (left - 1) * self._cost.step_time([request.num_tokens], [1])
        return due - work


@hookimpl
def headway_register(registry):
    registry.add("order", "least_slack", LeastSlack)
