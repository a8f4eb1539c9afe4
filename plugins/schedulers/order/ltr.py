"""Learning to rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import Context, KeyOrder, Registry, Request, StepRecord, View, hookimpl, param

from .alarms import Alarms


@dataclass
class LearningToRank(KeyOrder):
    """vLLM-LTR (Fu et al., NeurIPS'24, Algorithm 1): shortest predicted rank first, and whoever starves is
    promoted.

    starvation_threshold: steps without service after which a request is promoted before all others.
    priority_quantum: steps of service for which it stays promoted. 200 and 10 are the authors'
    (hao-ai-lab/vllm-ltr).

    The rank is the predictor's mean, read once when a request arrives. Differs: the paper learns it with an
    OPT model; here predictor=noisy with a Kendall tau stands for a ranker of that quality. The paper ranks
    running requests too: that is scheduler=preemptive.
    """

    starvation_threshold: int = param(200, min=1, max=2**31 - 1, unit="steps")
    priority_quantum: int = param(10, min=1, max=2**31 - 1, unit="steps")
    requires = ("predictor",)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor = ctx.roles["predictor"]
        self._rank: dict[int, float] = {}
        self._promoted: dict[int, int] = {}  # request index -> steps of service left at high priority
        self._starving, self._step = Alarms(), 0

    def key(self, request: Request) -> tuple[bool, float]:
        return request.index not in self._promoted, self._rank[request.index]

    def order(self, view: View) -> Iterable[Request]:
        self._step = view.step
        for request in self._starving.pop_due(view.step):
            self._promoted[request.index] = self.priority_quantum
            self.rekey(request)
        return super().order(view)

    def on_arrival(self, request: Request, now: float) -> None:
        self._rank[request.index] = self._predictor.predict(request).mean
        super().on_arrival(request, now)
        self._starving.set(request, self._step + self.starvation_threshold)

    def on_preempt(self, request: Request, now: float) -> None:
        super().on_preempt(request, now)
        self._starving.set(request, self._step + self.starvation_threshold)

    def on_admit(self, request: Request, now: float) -> None:
        super().on_admit(request, now)
        self._starving.clear(request)

    def on_step_end(self, record: StepRecord) -> None:
        if self._promoted:
            for request in record.plan.requests:
                left = self._promoted.get(request.index)
                if left is None:
                    continue
                if left > 1:
                    self._promoted[request.index] = left - 1
                else:
                    del self._promoted[request.index]
                    self.rekey(request)

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._starving.clear(request)
        self._promoted.pop(request.index, None)
        self._rank.pop(request.index, None)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "ltr", LearningToRank)
