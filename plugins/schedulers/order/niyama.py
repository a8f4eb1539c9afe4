"""Deadlines, weighed against the work that is left, and who cannot make it goes last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headway import Context, KeyOrder, Registry, Request, RequestState, StepRecord, View, hookimpl, param

from .edf import NEVER

DECAY = 0.995  # of the measured prefill throughput, a step; the authors' value


@dataclass
class Niyama(KeyOrder):
    """Niyama, later QoServe (Goel et al., arXiv 2503.22562, section 3): arrival + SLO + alpha * prefill
    tokens left, smallest first.

    alpha: seconds per token. 0 is EDF, much is shortest remaining prefill first; 8 ms is the authors'
    default. output_len: tokens that are expected of an answer; an e2el target, where there is no ttft, leaves
    the time of that many decodes.

    Eager relegation: a request that has not started, and whose prefill would end after its deadline at the
    throughput that prefills have had lately, goes behind all that can still make it; once, and for good.
    Requests without a target come last. The paper's selective preemption, by which a better request overtakes
    a prompt that is half done, is scheduler=selective, its dynamic chunks are chunk=dynamic_chunk. Differs:
    the time of a decode is the cost model's for one alone, and relegation knows no tiers of users.
    """

    alpha: float = param(0.008, min=0, max=1e6, unit="seconds")
    output_len: int = param(256, min=0, max=2**31 - 1, unit="tokens")
    may_starve = "a request that cannot make its deadline waits for all that can"
    requires = ("step_time", "slo")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        assert ctx.cost_model is not None  # since it requires step_time
        self._cost = ctx.cost_model
        chunk = min(512, ctx.max_num_batched_tokens)
        self._throughput = chunk / self._cost.step_time([0], [chunk])  # prefill tokens a second
        self._relegated: set[int] = set()  # request index

    def key(self, request: Request) -> tuple[bool, float]:
        return request.index in self._relegated, self.due(request) + self.alpha * request.num_new_tokens

    def due(self, request: Request) -> float:
        """When its prompt must be done, in seconds on the run's clock."""
        slo = request.slo
        if slo.ttft is not None:
            return request.arrival_time + slo.ttft
        if slo.e2el is not None:
            decode = self._cost.step_time([request.num_prompt_tokens], [1])
            return request.arrival_time + slo.e2el - self.output_len * decode
        return NEVER

    def order(self, view: View) -> Iterator[Request]:
        late = []
        for request in super().order(view):
            if self._is_late(request, view.now):
                self._relegated.add(request.index)
                self.rekey(request)
                late.append(request)
            else:
                yield request
        yield from sorted(late, key=self.rank)

    def _is_late(self, request: Request, now: float) -> bool:
        """Whether it is found only now that it cannot make it."""
        if request.index in self._relegated or request.state is not RequestState.WAITING:
            return False
        return now + request.num_new_tokens / self._throughput > self.due(request)

    def on_step_end(self, record: StepRecord) -> None:
        prefill = sum(n for n in record.plan.lengths if n > 1)
        if prefill and record.end > record.start:
            self._throughput = DECAY * self._throughput + (1 - DECAY) * prefill / (record.end - record.start)

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._relegated.discard(request.index)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "niyama", Niyama)
