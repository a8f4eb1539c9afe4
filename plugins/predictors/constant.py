"""The same length for everybody."""

from __future__ import annotations

from dataclasses import dataclass

from headway import ConfigError, Context, LengthPrediction, Predictor, Request, hookimpl


@dataclass
class Constant(Predictor):
    """Predicts `length` output tokens for every request, capped by what the request may generate."""

    length: float = 128.0

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if not self.length > 0:
            raise ConfigError(f"predictor.length={self.length}: expected more than 0 tokens")

    def predict(self, request: Request) -> LengthPrediction:
        cap = request.sampling.max_tokens
        length = self.length if cap is None else min(self.length, float(cap))
        return LengthPrediction(length, length)


@hookimpl
def headway_register(registry):
    registry.add("predictor", "constant", Constant)
