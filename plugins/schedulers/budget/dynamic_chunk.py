"""The chunk that every decode can afford."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, Request, TokenBudget, View, hookimpl, param


@dataclass
class DynamicChunk(TokenBudget):
    """Dynamic chunking (Niyama, arXiv 2503.22562; PolyServe, arXiv 2507.17769): the largest chunk that leaves no decode late.

    tbt: target between tokens, seconds, for requests without slo.tpot.
    tile: chunks are multiples of so many tokens, except the last of a prompt.

    The k-th token after the first is due k targets after it, so a request that is ahead has saved up slack. The chunk is the largest for which
    the executor's cost model predicts a step no longer than the least slack of all running decodes; with steps in flight, the slack
    is shared with them. A decode that is late already stops prefill until it has caught up or ended.
    """

    tbt: float = param(0.1, above=0, max=1e9, unit="seconds")
    tile: int = param(16, min=1, max=2**31 - 1, unit="tokens")
    requires = ("step_time",)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._moment: tuple[int, float, int] = (-1, 0.0, 0)  # step, now and lag for which the next two hold
        self._slack = 0.0
        self._used_up = False  # no room for another tile

    def tokens(self, request: Request, left: int, view: View) -> int:
        if (moment := (view.step, view.now, view.lag)) != self._moment:
            self._moment, self._slack, self._used_up = moment, self.slack(view), False
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
        """Seconds that this step may take; infinite where nobody decodes."""
        least = float("inf")
        for request in view.running:
            if request.token_times and request.num_new_tokens <= 1:  # one that recomputes is a prefill again
                # This step brings the token after those that have come back and those of the steps in flight.
                due = request.token_times[0] + (len(request.token_times) + view.lag) * (request.slo.tpot or self.tbt)
                least = min(least, due)
        return (least - view.now) / (1 + view.lag)


@hookimpl
def headway_register(registry):
    registry.add("budget", "dynamic_chunk", DynamicChunk)
