"""What similar requests took."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass

from headway import Context, LengthPrediction, Predictor, Registry, Request, RequestState, hookimpl, param

KINDS = ("client", "category", "all")
UPPER = ("quantile", "sample")


@dataclass
class History(Predictor):
    """Output lengths of the last finished requests of the same client or category, as in Past-Future
    (LightLLM, ASPLOS'25, section 3).

    by: whose history: "client", "category" (tags) or "all". The paper's is one for all.
    window: finished requests that count.
    upper: the upper prediction is a "quantile" of the lengths, or a "sample" of them, drawn anew each time,
    as in the paper.
    quantile: of the upper prediction.
    initial: prediction before the first one has finished, at most max_tokens; None is max_tokens, or what the
    context leaves.

    For a request that has generated n tokens only lengths above n count, so a prediction is always more than
    is already there; a request that outlives them all is given one token more. Refused requests teach
    nothing.
    """

    by: str = param("category", choices=KINDS)
    window: int = param(256, min=1, max=1_000_000, unit="requests")
    upper: str = param("quantile", choices=UPPER)
    quantile: float = param(0.9, above=0, max=1)
    initial: float | None = param(None, above=0, max=1e9, unit="tokens")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._max_model_len = ctx.max_model_len
        self._recent: dict[str, deque[int]] = {}  # in order of finishing
        self._sorted: dict[str, list[int]] = {}  # the same lengths

    def predict(self, request: Request) -> LengthPrediction:
        lengths, made = self._sorted.get(self._kind(request)), request.num_output_tokens
        if not lengths:
            length = max(made + 1.0, self._guess(request))
            return LengthPrediction(length, length)
        above = lengths[bisect_right(lengths, made) :] if made else lengths
        if not above:
            return LengthPrediction(made + 1.0, made + 1.0)
        quantile = self.rng.random() if self.upper == "sample" else self.quantile
        upper = above[min(len(above) - 1, int(quantile * len(above)))]
        return LengthPrediction(sum(above) / len(above), float(upper))

    def _guess(self, request: Request) -> float:
        left = self._max_model_len - request.num_prompt_tokens
        cap = request.sampling.max_tokens
        longest = float(left if cap is None else min(left, cap))
        return longest if self.initial is None else min(self.initial, longest)

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
def headway_register(registry: Registry) -> None:
    registry.add("predictor", "history", History)
