"""Virtual token counter that charges what it expects."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from headway import Context, Registry, Request, StepRecord, hookimpl

from .vtc import VirtualTokenCounter


@dataclass
class PredictedTokenCounter(VirtualTokenCounter):
    """VTC with length prediction (Sheng et al., OSDI'24; its section on length prediction, and the artifact's
    vtc_oracle and vtc_len_predict): the answer that is expected is charged when its request starts.

    Parameters are those of order=vtc. Tokens beyond the prediction are charged as they come; what was charged
    for tokens that did not come is given back at the end. With `predictor=oracle` the counters are right at
    once, and clients drift apart less. Differs: the artifact predicts a moving average of five answers of the
    client; the nearest here is `predictor=history predictor.by=client predictor.window=5`.
    """

    requires = ("predictor",)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor = ctx.roles["predictor"]
        self._expected: dict[int, int] = {}  # request index -> tokens of its answer that have been charged
        self._ended: list[int] = []  # whose last step is about to be told

    def on_admit(self, request: Request, now: float) -> None:
        super().on_admit(request, now)
        if request.num_admissions == 1:
            expected = max(0, round(self._predictor.predict(request).mean))
            self._expected[request.index] = expected
            self._charge(request, self.wq * expected)

    def on_step_end(self, record: StepRecord) -> None:
        for request, new in zip(record.plan.requests, record.tokens, strict=True):
            unexpected = min(len(new), request.num_output_tokens - self._expected.get(request.index, 0))
            if unexpected > 0:
                self._charge(request, self.wq * unexpected)
        for index in self._ended:
            self._expected.pop(index, None)
        self._ended.clear()

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        expected = self._expected.get(request.index, 0)
        if request.num_output_tokens < expected:
            self._charge(request, -self.wq * (expected - request.num_output_tokens))
            self._move_up(request.tags.client)
        self._ended.append(request.index)

    def _move_up(self, client: str) -> None:
        """Its counter has become smaller, which the heap of VTC, where counters only grow, does not
        expect."""
        others = [entry for entry in self._heap if entry[1] != client]
        if len(others) < len(self._heap):
            self._heap = [*others, (self.counters[client], client)]
            heapq.heapify(self._heap)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "vtc_predicted", PredictedTokenCounter)
