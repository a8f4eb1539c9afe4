"""Pins after a tool call, with a time to live."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from headway import ConfigError, Context, KVControl, Registry, Request, Retention, hookimpl, param


class Memory:
    """eta of the workload: how much the number of calls that a program has made says about how many are left.

    Minus the correlation of k and N - k over the calls k = 1 .. N - 1 of programs of N calls: 1 where all are
    equally long, about 0 where the number left does not depend on that made. Both run over the same numbers,
    so their variance is one.
    """

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._xy = 0.0

    def learn(self, calls: int) -> None:
        """A program of so many calls has ended."""
        n = calls - 1
        self._n += n
        self._x += n * calls / 2
        self._xx += n * calls * (2 * calls - 1) / 6
        self._xy += n * calls * (calls + 1) / 6

    @property
    def eta(self) -> float:
        """1 until there is something to learn from."""
        if not self._n:
            return 1.0
        mean = self._x / self._n
        variance = self._xx / self._n - mean * mean
        return 1.0 if variance < 1e-9 else (mean * mean - self._xy / self._n) / variance


@dataclass
class TimeToLive(Retention):
    """Blocks of a request that ends in a tool call are pinned for a time to live (Continuum; Li et al., arXiv
    2511.02230, Eq. 1 and 2).

    The time is the tau for which P(tau) * (T * eta + prefill) - tau is largest: P is the share of the tool's
    calls that took at most tau, T the mean queueing of turns whose blocks were evicted meanwhile, `prefill`
    the time to compute them again, and eta what the number of calls made says about those left (see Memory).
    All in seconds; as in the paper, a second of a pin costs a second, whatever its size: its mean footprint.

    min_calls: a tool with fewer known calls goes by those of all tools, and where these are fewer too, by an
    exponential of mean `prior`. The paper has 100 and 1 s.
    history: calls and queueing times that are remembered, of each tool and of all.

    A program ends with a request that calls no tool, or that says it is the last. The session's next turn,
    the end of tau, or a lack of memory ends the pin. Not here: reloading from the host, which the paper
    weighs against computing again.
    """

    prior: float = param(1.0, min=1e-6, max=1e6, unit="seconds")
    min_calls: int = param(100, min=1, max=1_000_000)
    history: int = param(1000, min=1, max=1_000_000)
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
        self._cost_model, self._size = ctx.cost_model, ctx.block_size
        self._durations: dict[str, deque[float]] = {}  # tool -> seconds of its last calls; "" for all tools
        # session -> its tool, since when, tokens it had cached
        self._calls: dict[str, tuple[str, float, int]] = {}
        self._made: dict[str, int] = {}  # session -> calls of its program so far
        # request index -> tokens of its session that were cached before its tool call
        self._returns: dict[int, int] = {}
        # seconds, of turns whose blocks were evicted
        self._queueing: deque[float] = deque(maxlen=self.history)
        self.memory = Memory()

    def on_arrival(self, request: Request, now: float) -> None:
        if call := self._calls.pop(request.tags.session, None):
            tool, since, cached = call
            seconds = max(0.0, request.arrival_time - since)
            for known in (tool, ""):
                self._durations.setdefault(known, deque(maxlen=self.history)).append(seconds)
            self._returns[request.index] = cached

    def on_admit(self, request: Request, now: float) -> None:
        had = self._returns.pop(request.index, 0)
        if request.num_admissions == 1 and request.num_cached_tokens < had:
            self._queueing.append(now - request.arrival_time)

    def on_finish(self, request: Request, now: float) -> None:
        self._returns.pop(request.index, None)

    def retain(self, request: Request, kv: KVControl, now: float) -> None:
        session, tool = request.tags.session, request.tags.tool
        if not session:
            return
        kv.unpin(session)
        made = self._made.get(session, 0) + 1
        if not tool or request.tags.last:
            self._made.pop(session, None)
            self.memory.learn(made)
            return
        self._made[session] = made
        stored = request.num_tokens - 1  # the last token was sampled, and never computed
        self._calls[session] = (tool, now, stored // self._size * self._size)
        if (tau := self.time_to_live(request)) > 0:
            kv.pin(request, now + tau)

    def time_to_live(self, request: Request) -> float:
        """tau in seconds; 0: not worth a pin."""
        queueing = sum(self._queueing) / len(self._queueing) if self._queueing else 0.0
        benefit = queueing * self.memory.eta + self._prefill_time(request.num_tokens)
        known: Sequence[float] = ()
        for tool in (request.tags.tool, ""):
            known = self._durations.get(tool, ())
            if len(known) >= self.min_calls:
                break
        else:
            return self.prior * log(benefit / self.prior) if benefit > self.prior else 0.0
        worth = [(0.0, 0.0)]
        worth += [((i + 1) / len(known) * benefit - tau, -tau) for i, tau in enumerate(sorted(known))]
        return -max(worth)[1]

    def _prefill_time(self, num_tokens: int) -> float:
        if self._cost_model is None:
            return num_tokens / self.prefill_rate
        return self._cost_model.step_time([0], [num_tokens])


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("retention", "ttl", TimeToLive)
