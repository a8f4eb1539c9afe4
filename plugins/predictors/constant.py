"""The same length for everybody."""

from __future__ import annotations

from dataclasses import dataclass

from headway import LengthPrediction, Predictor, Registry, Request, hookimpl, param


@dataclass
class Constant(Predictor):
    """Predicts `length` output tokens for every request, capped by what the request may generate."""

    length: float = param(128.0, above=0, max=1e9, unit="tokens")

    def predict(self, request: Request) -> LengthPrediction:
        cap = request.sampling.max_tokens
        length = self.length if cap is None else min(self.length, float(cap))
        return LengthPrediction(length, length)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("predictor", "constant", Constant)
