"""The chunk that every decode can afford."""

from __future__ import annotations

from dataclasses import dataclass

from headway import ChunkSize, Context, Registry, Request, View, hookimpl, param


@dataclass
class DynamicChunk(ChunkSize):
    """Dynamic chunking (Niyama, arXiv 2503.22562, section 3; PolyServe, arXiv 2507.17769): the largest chunk
    that makes no decode late.

    tile: chunks are multiples of so many tokens, except the last of a prompt.
    floor: prompt tokens that a step may take even if a decode is late by them, or late already.

    Token n of a request is due at arrival + slo.ttft + (n - 1) * slo.tpot, so who emits early has saved up
    slack; without a target for the first token it is due when it came. A request without slo.tpot makes no
    demands. The chunk is the largest for which the executor's cost model predicts a step no longer than the
    least slack of all running decodes; with steps in flight, the slack is shared with them. Differs from the
    authors' code in what it searches: that goes through a table of sizes from 128 to 2,552 tokens and adds
    20% to predictions.
    """

    tile: int = param(16, min=1, max=2**31 - 1, unit="tokens")
    floor: int = param(128, min=0, max=2**31 - 1, unit="tokens")
    requires = ("step_time", "slo")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._moment: tuple[int, float, int] = (-1, 0.0, 0)  # step, now and lag for which the next two hold
        self._slack = 0.0
        self._used_up = False  # no room for another tile

    def tokens(self, request: Request, left: int, view: View) -> int:
        if (moment := (view.step, view.now, view.lag)) != self._moment:
            self._moment, self._slack, self._used_up = moment, self.slack(view), False
        starts, lengths = view.planned
        least = min(left, max(0, self.floor - sum(n for n in lengths if n > 1)))
        return max(least, self._affordable(request, left, view))

    def _affordable(self, request: Request, left: int, view: View) -> int:
        """Tokens within the slack."""
        if self._used_up:
            return 0
        starts, lengths = view.planned
        first = request.num_computed_tokens + request.num_scheduled_tokens or view.match(request).num_tokens
        starts, lengths = [*starts, first], [*lengths, left]

        def fits(n: int) -> bool:
            lengths[-1] = n
            return view.step_time(starts, lengths) <= self._slack

        if self._slack == float("inf") or fits(left):
            return left
        self._used_up = True
        low, high = 0, -(-left // self.tile)  # tiles: low fit, high do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * self.tile) else (low, middle)
        return low * self.tile

    def slack(self, view: View) -> float:
        """Seconds that this step may take; infinite where no decode has a target."""
        least = float("inf")
        for request in view.running:
            target = request.slo.tpot
            if target is None or not request.token_times or request.num_new_tokens > 1:
                continue  # who recomputes is a prefill again
            ttft = request.slo.ttft
            first = request.token_times[0] if ttft is None else request.arrival_time + ttft
            # This step brings the token after those that have come back and those of the steps in flight.
            least = min(least, first + (len(request.token_times) + view.lag) * target)
        return (least - view.now) / (1 + view.lag)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("chunk", "dynamic_chunk", DynamicChunk)
