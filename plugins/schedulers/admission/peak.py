"""What admissions by memory share: the peak of KV blocks that running requests and a new one will come to
hold."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from headway import Admission, Admit, Context, Defer, Request, View, param

Entry = tuple[int, int]  # (-tokens left, known tokens): sorts the one with most left first


@dataclass
class PeakAdmission(Admission):
    """Base: admits while the peak fits. A subclass says how many tokens a request has left.

    Sort the running requests and the new one by tokens left, most first. When the i-th ends, those before it
    are still there and each has grown by what the i-th had left, so the peak is the largest sum of the first
    i sizes, over i, in whole blocks. A cached prefix counts in full, as it may be evicted. The queue is taken
    in its order: behind a request that does not fit nobody starts in that step.
    """

    reserved: float = param(0.0, min=0, below=1)
    readmits = True

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._size, self._capacity = ctx.block_size, int(ctx.num_blocks * (1 - self.reserved) + 1e-9)
        self._new = -1  # index of the request that is arriving
        self._full = False  # a request did not fit at this moment
        self._moment: tuple[int, float, int] = (-1, 0.0, 0)  # step, now and lag for which the rest holds
        self._batch: list[Entry] = []  # of the running requests
        # Request index -> its entry: one forecast per moment, however often a scheduler asks.
        self._forecasts: dict[int, Entry] = {}

    def left(self, request: Request) -> int:
        """Tokens that it will still generate, at least 1."""
        raise NotImplementedError

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

    def peak(self, batch: list[Entry]) -> int:
        """Most KV blocks that these will hold at once. Of a request's tokens the last one is not stored."""
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
            over = sum(rests[size - more + 1 :]) if more else 0
            most = max(most, blocks + i * grown + begun + over)
        return most

    def _forecast(self, request: Request) -> Entry:
        if (found := self._forecasts.get(request.index)) is None:
            # Where a step holds prompts alone, who is in it is a token ahead of those that decode.
            found = (-self.left(request), request.num_tokens + request.is_prefill)
            self._forecasts[request.index] = found
        return found

    def on_arrival(self, request: Request, now: float) -> None:
        self._new = request.index

    def on_admit(self, request: Request, now: float) -> None:
        insort(self._batch, self._forecast(request))
