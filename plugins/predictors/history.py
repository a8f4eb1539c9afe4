"""What similar requests took."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass

from headway import ConfigError, Context, LengthPrediction, Predictor, Request, RequestState, hookimpl, near

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

    by: str = "category"
    window: int = 256
    quantile: float = 0.9
    initial: float = 256.0

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self.by not in KINDS:
            raise ConfigError(f"predictor.by={self.by!r}: expected one of {', '.join(KINDS)}.{near(self.by, KINDS)}")
        if self.window < 1 or not 0 < self.quantile <= 1 or not self.initial > 0:
            raise ConfigError(
                f"predictor.window={self.window}, quantile={self.quantile}, initial={self.initial}: "
                "expected a window of at least 1, 0 < quantile <= 1 and initial > 0"
            )
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
