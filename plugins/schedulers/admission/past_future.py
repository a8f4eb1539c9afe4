"""Admission by predicted peak memory."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from headway import Admission, Admit, Context, Defer, Request, View, hookimpl, param


@dataclass
class PastFuture(Admission):
    """Past-Future (LightLLM, Gong et al., ASPLOS'25, section 3): admit only while the predicted peak of KV memory fits.

    reserved: share of the pool that is kept free, for predictions that fall short.

    Sort the running requests and the new one by predicted tokens left, most first. When the i-th ends, those before it are still there
    and each has grown by what the i-th had left, so peak = max over i of (sum of the first i sizes + i * left of the i-th).
    Lengths are the predictor's upper quantile; the paper draws them from the lengths of finished requests, which is predictor=history.
    A prediction is made at admission, and again when a request outlives it. A cached prefix counts in full, as it may be evicted.
    The queue is taken in its order, as in the paper: behind a request that does not fit nobody starts in that step.
    """

    reserved: float = param(0.05, min=0, below=1)
    requires = ("predictor",)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor = ctx.roles["predictor"]
        self._capacity = ctx.num_blocks * ctx.block_size * (1 - self.reserved)
        self._length: dict[int, float] = {}  # running request index -> predicted output tokens
        self._new = -1  # index of the request that is arriving
        self._full = False  # a request did not fit at this moment
        self._moment: tuple[int, float, int] = (-1, 0.0, 0)  # step, now and lag for which _batch and _full hold
        self._batch: list[tuple[float, int]] = []  # (-predicted tokens left, tokens now), most left first

    def admit(self, request: Request, view: View) -> Admit | Defer:
        if request.index == self._new:
            self._new = -1
            return Admit()  # it is asked again when it is its turn
        if (moment := (view.step, view.now, view.lag)) != self._moment:
            self._moment, self._full, self._batch = moment, False, sorted(map(self._forecast, view.running))
        if not view.num_running:
            return Admit()  # alone it fits, or the engine would have refused it
        self._full = self._full or self.peak([*self._batch, self._forecast(request)]) > self._capacity
        return Defer() if self._full else Admit()

    def peak(self, batch: list[tuple[float, int]]) -> float:
        """Most KV tokens that these (-tokens left, tokens now) will hold at once."""
        total, most = 0, 0.0
        for i, (left, now) in enumerate(sorted(batch), 1):
            total += now
            most = max(most, total - left * i)
        return most

    def _forecast(self, request: Request) -> tuple[float, int]:
        made = request.num_output_tokens
        length = self._length.get(request.index, 0.0)
        if length <= made:
            length = self._length[request.index] = max(made + 1.0, self._predictor.predict(request).upper)
        return made - length, request.num_tokens

    def on_arrival(self, request: Request, now: float) -> None:
        self._new = request.index

    def on_admit(self, request: Request, now: float) -> None:
        insort(self._batch, self._forecast(request))

    def on_finish(self, request: Request, now: float) -> None:
        self._length.pop(request.index, None)


@hookimpl
def headway_register(registry):
    registry.add("admission", "past_future", PastFuture)
