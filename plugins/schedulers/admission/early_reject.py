"""Rejection before any work is spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headway import Admission, Admit, Context, Registry, Reject, Request, View, hookimpl, param


@dataclass
class EarlyReject(Admission):
    """Early rejection (Mooncake, Qin et al., arXiv 2407.00079, section 7): refuse a request whose predicted
    TTFT or TBT is beyond its SLO.

    ttft, tbt: targets in seconds for requests without slo.ttft, slo.tpot; None: no target, never refused for
    it. chunk_size: prompt tokens that a step takes, for the prediction.

    Without targets, neither here nor on the requests, it would admit everybody, so such a run is refused.

    TTFT: all prompt tokens before this request and its own, in chunks, each in a step with everything that
    decodes now; asked again when it is about to start, with what is still before it then. TBT: one decode
    step of what runs now and this request. Step times are the executor's cost model. Not here: the paper's
    forecast of the decode load at the end of the prefill.
    """

    ttft: float | None = param(None, min=0, max=1e9, unit="seconds")
    tbt: float | None = param(None, min=0, max=1e9, unit="seconds")
    chunk_size: int = param(512, min=1, max=2**31 - 1, unit="tokens")
    requires: ClassVar[tuple[str, ...]] = ("step_time", "slo")

    def __post_init__(self) -> None:
        if self.ttft is not None or self.tbt is not None:
            self.requires = ("step_time",)  # type: ignore[misc]  # of this object alone

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._waiting: dict[int, int] = {}  # waiting request index -> its tokens
        self._queued = 0  # their sum
        self._new = -1  # index of the request that is arriving

    def admit(self, request: Request, view: View) -> Admit | Reject:
        new, self._new = request.index == self._new, -1
        ttft = self.ttft if request.slo.ttft is None else request.slo.ttft
        tbt = self.tbt if request.slo.tpot is None else request.slo.tpot
        contexts = [r.num_tokens for r in view.running if r.num_new_tokens <= 1]
        ones = [1] * len(contexts)
        if (
            tbt is not None
            and (predicted := view.step_time([*contexts, request.num_tokens], [*ones, 1])) > tbt
        ):
            return Reject(f"predicted TBT of {predicted:.4f} s is beyond {tbt} s")
        if ttft is not None:
            ahead = sum(r.num_new_tokens for r in view.running if r.num_new_tokens > 1)
            own = request.num_tokens - view.match(request).num_tokens
            tokens = ahead + own + (self._queued - request.num_tokens if new else 0)
            chunk = min(tokens, self.chunk_size)
            steps = -(-tokens // chunk)
            predicted = (
                view.now - request.arrival_time + steps * view.step_time([*contexts, 0], [*ones, chunk])
            )
            if predicted > ttft:
                return Reject(f"predicted TTFT of {predicted:.4f} s is beyond {ttft} s")
        return Admit()

    def on_arrival(self, request: Request, now: float) -> None:
        self._new = request.index
        self.on_preempt(request, now)

    def on_preempt(self, request: Request, now: float) -> None:
        self._waiting[request.index] = request.num_tokens
        self._queued += request.num_tokens

    def on_admit(self, request: Request, now: float) -> None:
        self._queued -= self._waiting.pop(request.index, 0)

    on_finish = on_admit


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("admission", "early_reject", EarlyReject)
