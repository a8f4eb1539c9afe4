"""The true length."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, LengthPrediction, Predictor, Registry, Request, hookimpl


@dataclass
class TrueLength(Predictor):
    """The true output length, which no deployed system knows; results are stamped with it.

    Where the workload gives no length and the model decides when to stop, it is max_tokens or what the
    context leaves.
    """

    sees_truth = True

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        assert ctx.truth is not None  # since it declares sees_truth = True
        self._truth = ctx.truth

    def predict(self, request: Request) -> LengthPrediction:
        length = float(self._truth.output_len(request))
        return LengthPrediction(length, length)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("predictor", "oracle", TrueLength)
