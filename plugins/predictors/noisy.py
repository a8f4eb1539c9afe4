"""The true length with an error of a chosen size."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import erf, exp, log
from random import Random

from headway import Context, LengthPrediction, Predictor, Registry, Request, hookimpl, param

SAMPLE = 64  # lengths from which the noise is tuned
MOST = 100.0  # logarithm of the largest factor: a tau near 0 asks for more than a float holds


@dataclass
class NoisyLength(Predictor):
    """The true output length times exp(sigma z), z standard normal; sigma is tuned so that predictions rank
    requests with a Kendall tau.

    tau: expected rank correlation of predicted and true lengths, 0 < tau <= 1 (vLLM-LTR reports its rankers
    this way). z_upper: the upper quantile is the mean times exp(z_upper sigma).

    Two requests whose log lengths differ by d keep their order with probability (1 + erf(d / 2 sigma)) / 2,
    so tau is the mean of erf(d / 2 sigma) over pairs of unequal lengths, whatever their distribution. Sigma
    is solved from the lengths of the first requests, again each time their number doubles, up to 64. A
    request's z depends on the seed and its id alone, so that orders which ask when a request arrives see the
    same errors.
    """

    tau: float = param(0.5, above=0, max=1)
    z_upper: float = param(1.0, min=0, max=10)
    sees_truth = True

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        assert ctx.truth is not None  # since it declares sees_truth = True
        self._truth, self._seed = ctx.truth, ctx.seed
        # until lengths are known: two that differ by a factor of e
        self.sigma = 0.0 if self.tau == 1 else spread([0.0, 1.0], self.tau)
        self._logs: list[float] = []
        self._noise: dict[int, float] = {}

    def predict(self, request: Request) -> LengthPrediction:
        if (z := self._noise.get(request.index)) is None:
            z = self._noise[request.index] = Random(f"{self._seed}/length/{request.id}").gauss(0.0, 1.0)
            self._learn(request)
        mean = self._truth.output_len(request) * exp(min(self.sigma * z, MOST))
        return LengthPrediction(mean, mean * exp(min(self.z_upper * self.sigma, MOST)))

    def on_finish(self, request: Request, now: float) -> None:
        self._noise.pop(request.index, None)

    def _learn(self, request: Request) -> None:
        logs = self._logs
        if len(logs) < SAMPLE and self.tau < 1:
            logs.append(log(max(1, self._truth.output_len(request))))
            if len(logs) >= 4 and len(logs) & (len(logs) - 1) == 0:
                self.sigma = spread(logs, self.tau)


def spread(logs: list[float], tau: float) -> float:
    """The sigma for which values with these logarithms and log-normal noise have an expected Kendall tau; 0
    where all are equal."""
    gaps = [abs(a - b) for a, b in combinations(logs, 2) if a != b]
    if not gaps:
        return 0.0
    low, high = 0.0, 1.0
    while sum(erf(gap / (2 * high)) for gap in gaps) > tau * len(gaps):
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if sum(erf(gap / (2 * middle)) for gap in gaps) > tau * len(gaps)
            else (low, middle)
        )
    return high


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("predictor", "noisy", NoisyLength)
