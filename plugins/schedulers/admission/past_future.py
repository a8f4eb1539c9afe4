"""Admission by predicted peak memory."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from math import ceil

from headway import Admission, Admit, Context, Defer, Request, View, hookimpl, param


@dataclass
class PastFuture(Admission):
    """Past-Future (LightLLM, Gong et al., ASPLOS'25, section 3): admit only while the predicted peak of KV memory fits.

    reserved: share of the pool that is kept free, for predictions that fall short.

    Sort the running requests and the new one by predicted tokens left, most first. When the i-th ends, those before it are still there
    and each has grown by what the i-th had left, so the peak is the largest sum of the first i sizes, over i,
    in whole blocks. Lengths are the predictor's upper value, asked anew at every decision, for preempted
    requests too; the paper draws them from the lengths of finished requests, and before there are any takes
    the cap: predictor=history predictor.upper=sample, as policy=past_future has it.
    The queue is taken in its order: behind a request that does not fit nobody starts in that step.

    Differs: a cached prefix counts in full, as it may be evicted. A prompt counts as computed in one step, as
    in LightLLM; of one that is computed in chunks the end comes later than predicted, and `reserved` must
    cover that. The paper also draws several times where few requests run.
    """

    reserved: float = param(0.05, min=0, below=1)
    requires = ("predictor",)
    readmits = True

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._predictor = ctx.roles["predictor"]
        self._size, self._capacity = ctx.block_size, int(ctx.num_blocks * (1 - self.reserved) + 1e-9)
        self._new = -1  # index of the request that is arriving
        self._full = False  # a request did not fit at this moment
        self._moment: tuple[int, float, int] = (-1, 0.0, 0)  # step, now and lag for which the rest holds
        self._batch: list[tuple[int, int]] = []  # (-predicted tokens left, tokens now), most left first
        # Request index -> its entry: one draw per moment, however often a scheduler asks.
        self._forecasts: dict[int, tuple[int, int]] = {}

    def admit(self, request: Request, view: View) -> Admit | Defer:
        if request.index == self._new:
            self._new = -1
            return Admit()  # it is asked again when it is its turn
        if (moment := (view.step, view.now, view.lag)) != self._moment:
            self._moment, self._full = moment, False
            self._forecasts.clear()
            self._batch = sorted(map(self._forecast, view.running))
        if not view.num_running:
            return Admit()  # alone it fits, or the engine would have refused it
        self._full = self._full or self.peak([*self._batch, self._forecast(request)]) > self._capacity
        return Defer() if self._full else Admit()

    def peak(self, batch: list[tuple[int, int]]) -> int:
        """Most KV blocks that these (-tokens left, known tokens) will hold at once. Of a request's tokens the
        last one is not stored.
        """
        size = self._size
        blocks = most = 0
        rests = [0] * size  # requests so far by the tokens in their last block; full blocks are in `blocks`
        for i, (left, now) in enumerate(sorted(batch), 1):
            full, rest = divmod(now - 1, size)
            blocks += full
            rests[rest] += 1
            grown, more = divmod(-left, size)
            # Who has r tokens in its last block needs one more block for r + more > 0 tokens, and two for
            # more than a block.
            begun = i - (rests[0] if not more else 0)
            most = max(most, blocks + i * grown + begun + (sum(rests[size - more + 1 :]) if more else 0))
        return most

    def _forecast(self, request: Request) -> tuple[int, int]:
        if (found := self._forecasts.get(request.index)) is None:
            made = request.num_output_tokens
            left = max(1, ceil(self._predictor.predict(request).upper) - made)
            # Where a step holds prompts alone, who is in it is a token ahead of those that decode.
            found = self._forecasts[request.index] = (-left, request.num_tokens + request.is_prefill)
        return found

    def on_arrival(self, request: Request, now: float) -> None:
        self._new = request.index

    def on_admit(self, request: Request, now: float) -> None:
        insort(self._batch, self._forecast(request))


@hookimpl
def headway_register(registry):
    registry.add("admission", "past_future", PastFuture)
