"""Admission by predicted peak memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from headway import Context, Predictor, Registry, Request, hookimpl, param

from .peak import PeakAdmission


@dataclass
class PastFuture(PeakAdmission):
    """Past-Future (LightLLM, Gong et al., ASPLOS'25, section 3): admit only while the predicted peak of KV
    memory fits.

    reserved: share of the pool that is kept free, for predictions that fall short.

    Lengths are the predictor's upper value, asked anew at every decision, for preempted requests too; the
    paper draws them from the lengths of finished requests, and before there are any takes the cap:
    predictor=history predictor.upper=sample, as policy=past_future has it.

    Differs: the peak is counted in whole blocks, where LightLLM has none. A prompt counts as computed in one
    step, as there; of one that is computed in chunks the end comes later than predicted, and `reserved` must
    cover that. The paper also draws several times where few requests run.
    """

    reserved: float = param(0.05, min=0, below=1)
    requires = ("predictor",)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor: Predictor = ctx.roles["predictor"]

    def left(self, request: Request) -> int:
        return max(1, ceil(self._predictor.predict(request).upper) - request.num_output_tokens)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("admission", "past_future", PastFuture)
