"""Goodput in each second of work that is left."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from headway import Context, MovingOrder, Registry, Request, StepRecord, hookimpl, param

STEP = 0.02  # seconds that a step is taken to last before one has ended, as in the authors' code
LEAST = 1e-6  # seconds, where steps take next to no time
MEASURED = 500  # steps whose mean it is afterwards: 10 times the authors' 50


@dataclass
class MarginGoodput(MovingOrder):
    """JITServe's priority (Zhang et al., NSDI'26, arXiv 2504.20068, and the authors' code): most goodput to
    be expected in each second that a request still takes.

    decode_weight: what a token of the answer is worth, one of the prompt being worth 1.
    penalty: power of target / expected time, where that is below 1, by which lateness shrinks goodput; 100 is
    what the authors' experiments set, so who is late by some percent is worth next to nothing.
    refresh: tokens after which the length of an answer is predicted anew; the upper quantile counts
    (policy=jitserve takes the authors' 0.95), so that a request is given time as if its answer were long
    until it turns out not to be.

    With slo.e2el prompt and answer count when the last token comes in time. Else the prompt is worth what it
    is if the first token comes within slo.ttft, and the tokens that are left what they are if the last comes
    within slo.ttft and a slo.tpot each. Work left is the mean of the last steps for each token. Calls of one
    session that are here together count as one: their goodput is added, the longest is the work.
    Differs, being built from the abstract and the authors' code: lengths are those of the predictor role,
    where the paper has a quantile regression forest over prompts; stages of a program that are still to come,
    which the paper matches with earlier programs' graphs, are not foreseen.
    """

    decode_weight: float = param(8.0, min=0, max=1e6)
    penalty: float = param(100.0, min=0, max=1e6)
    refresh: int = param(50, min=1, max=2**31 - 1, unit="tokens")
    may_starve = "a request that cannot make its target waits for all that can"
    requires = ("predictor", "slo")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor = ctx.roles["predictor"]
        self._lasted: deque[float] = deque(maxlen=MEASURED)
        self._sum = 0.0  # of those
        self.step_seconds = STEP  # what a token takes
        # index of a request -> (tokens that it had generated when its length was predicted, predicted length)
        self._length: dict[int, tuple[int, float]] = {}
        self._programs: dict[str, dict[int, Request]] = {}  # session -> its calls that are here, by index

    def key(self, request: Request, now: float) -> tuple[float, float]:
        calls = self._programs.get(request.tags.session)
        if not calls or len(calls) == 1:
            goodput, seconds = self.expected(request, now)
        else:
            each = [self.expected(call, now) for call in calls.values()]
            goodput, seconds = sum(goodput for goodput, _ in each), max(seconds for _, seconds in each)
        return -goodput / seconds, seconds

    def expected(self, request: Request, now: float) -> tuple[float, float]:
        """(weighted tokens that come in time, of those that have not come yet; seconds that they take)."""
        slo, waited, length = request.slo, now - request.arrival_time, self.length(request)
        left = length - request.num_output_tokens
        seconds = left * self.step_seconds
        if slo.e2el is not None:
            whole = request.num_prompt_tokens + self.decode_weight * length
            return whole * self.in_time(slo.e2el, waited + seconds), seconds
        last = None if slo.ttft is None or slo.tpot is None else slo.ttft + length * slo.tpot
        goodput = self.decode_weight * left * self.in_time(last, waited + seconds)
        if not request.num_output_tokens:
            goodput += request.num_prompt_tokens * self.in_time(slo.ttft, waited + self.step_seconds)
        return goodput, seconds

    def length(self, request: Request) -> float:
        """Predicted tokens of the whole answer, more than there are already."""
        made = request.num_output_tokens
        at, length = self._length.get(request.index, (-self.refresh, 0.0))
        if made - at >= self.refresh:
            length = self._predictor.predict(request).upper
            self._length[request.index] = made, length
        return max(length, made + 1.0)

    def in_time(self, target: float | None, expected: float) -> float:
        if target is None or expected <= target:
            return 1.0
        return float((target / expected) ** self.penalty)

    def on_arrival(self, request: Request, now: float) -> None:
        if session := request.tags.session:
            self._programs.setdefault(session, {})[request.index] = request

    def on_step_end(self, record: StepRecord) -> None:
        if len(self._lasted) == MEASURED:
            self._sum -= self._lasted[0]
        self._lasted.append(record.end - record.start)
        self._sum += record.end - record.start
        self.step_seconds = max(self._sum / len(self._lasted), LEAST)

    def on_finish(self, request: Request, now: float) -> None:
        self._length.pop(request.index, None)
        if calls := self._programs.get(request.tags.session):
            calls.pop(request.index, None)
            if not calls:
                del self._programs[request.tags.session]


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "jitserve", MarginGoodput)
