"""What similar requests took."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass

from headway import Context, LengthPrediction, Predictor, Request, RequestState, hookimpl, param

KINDS = ("client", "category", "all")


@dataclass
class History(Predictor):
    """Output lengths of the last finished requests of the same client or category, as in Past-Future (LightLLM, ASPLOS'25, section 3).

    by: whose history: "client", "category" (tags) or "all".
    window: finished requests that count.
    quantile: of the upper prediction.
    initial: prediction before the first one has finished, capped by max_tokens.

    For a request that has generated n tokens only lengths above n count, so a prediction is always more than is already there; a
    request that outlives them all is given one token more. Refused requests teach nothing.
    """

    by: str = param("category", choices=KINDS)
    window: int = param(256, min=1, max=1_000_000, unit="requests")
    quantile: float = param(0.9, above=0, max=1)
    initial: float = param(256.0, above=0, max=1e9, unit="tokens")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._recent: dict[str, deque[int]] = {}  # in order of finishing
        self._sorted: dict[str, list[int]] = {}  # the same lengths

    def predict(self, request: Request) -> LengthPrediction:
        lengths, made = self._sorted.get(self._kind(request)), request.num_output_tokens
        if not lengths:
            cap = request.sampling.max_tokens
            length = max(made + 1.0, self.initial if cap is None else min(self.initial, float(cap)))
            return LengthPrediction(length, length)
        above = lengths[bisect_right(lengths, made) :] if made else lengths
        if not above:
            return LengthPrediction(made + 1.0, made + 1.0)
        return LengthPrediction(sum(above) / len(above), float(above[min(len(above) - 1, int(self.quantile * len(above)))]))

    def on_finish(self, request: Request, now: float) -> None:
        if request.state is not RequestState.FINISHED:
            return
        kind = self._kind(request)
        recent, lengths = self._recent.setdefault(kind, deque()), self._sorted.setdefault(kind, [])
        recent.append(request.num_output_tokens)
        insort(lengths, request.num_output_tokens)
        if len(recent) > self.window:
            del lengths[bisect_left(lengths, recent.popleft())]

    def _kind(self, request: Request) -> str:
        return "" if self.by == "all" else getattr(request.tags, self.by)


@hookimpl
def headway_register(registry):
    registry.add("predictor", "history", History)
