"""Pins after a tool call, with a time to live."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import log

from headway import ConfigError, Context, KVControl, Request, Retention, hookimpl, param


@dataclass
class TimeToLive(Retention):
    """Blocks of a request that ends in a tool call are pinned for a time to live (Continuum; Li et al., arXiv 2511.02230).

    The time is tau = argmax P(tau, f) * Benefit - Cost(tau).
    P(tau, f) is the share of tool f's last calls that took at most tau. Benefit is the prefill and the queueing that a hit saves; Cost is
    tau times the share of the pool that is pinned, both in seconds. A tool with fewer than `min_calls` known calls counts as exponential
    with mean `prior`. The session's next turn, the end of tau, or a lack of memory ends the pin.
    """

    prior: float = param(1.0, min=1e-6, max=1e6, unit="seconds")
    min_calls: int = param(4, min=1, max=1_000_000)
    history: int = param(64, min=1, max=1_000_000, doc="calls remembered for each tool")
    prefill_rate: float = param(
        10000.0,
        min=1e-3,
        max=1e12,
        unit="tokens a second",
        doc="where the executor has no cost model",
    )

    def __post_init__(self) -> None:
        if self.history < self.min_calls:
            least = f"at least retention.min_calls={self.min_calls}"
            raise ConfigError(f"retention.history={self.history}: expected {least}")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._cost_model, self._num_blocks = ctx.cost_model, ctx.num_blocks
        self._durations: dict[str, deque[float]] = {}  # tool -> seconds of its last calls
        self._calls: dict[str, tuple[str, float]] = {}  # session -> its tool call in progress, and since when
        self._queueing = 0.0  # mean seconds between arrival and start
        self._starts = 0

    def on_arrival(self, request: Request, now: float) -> None:
        if call := self._calls.pop(request.tags.session, None):
            tool, since = call
            self._durations.setdefault(tool, deque(maxlen=self.history)).append(max(0.0, request.arrival_time - since))

    def on_admit(self, request: Request, now: float) -> None:
        if not request.num_preemptions:
            self._starts += 1
            self._queueing += (now - request.arrival_time - self._queueing) / self._starts

    def retain(self, request: Request, kv: KVControl, now: float) -> None:
        tags = request.tags
        if not tags.session:
            return
        kv.unpin(tags.session)
        if tags.tool:
            self._calls[tags.session] = (tags.tool, now)
            if (tau := self.time_to_live(request)) > 0:
                kv.pin(request, now + tau)

    def time_to_live(self, request: Request) -> float:
        """tau in seconds; 0: not worth a pin."""
        benefit = self._prefill_time(request.num_tokens) + self._queueing
        price = len(request.block_table) / self._num_blocks  # of a second
        known = self._durations.get(request.tags.tool, ())
        if len(known) < self.min_calls:
            return self.prior * log(benefit / (price * self.prior)) if benefit > price * self.prior else 0.0
        worth = [(0.0, 0.0)]
        worth += [((i + 1) / len(known) * benefit - tau * price, tau) for i, tau in enumerate(sorted(known))]
        return max(worth)[1]

    def _prefill_time(self, num_tokens: int) -> float:
        if self._cost_model is None:
            return num_tokens / self.prefill_rate
        return self._cost_model.step_time([0], [num_tokens])


@hookimpl
def headway_register(registry):
    registry.add("retention", "ttl", TimeToLive)
