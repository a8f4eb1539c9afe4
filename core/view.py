"""The View: everything a policy may know at a step. Read-only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .blocks import BlockPool
from .clock import is_finite
from .errors import PolicyError
from .kv_view import KVView
from .matching import Match, Matches
from .policy import SERVICES, LengthPrediction, Order
from .request import WANT_TO_START, Request, RequestState
from .roles import Roles
from .roster import Roster

if TYPE_CHECKING:
    from .step import StepBuilder

__all__ = ["Match", "View"]

_PREEMPTED = RequestState.PREEMPTED


class Budget(NamedTuple):
    tokens: int
    seqs: int


class View:
    """What a policy may know at this step. Read-only; lists are as it began, in the order (arrival,
    index)."""

    def __init__(
        self,
        roles: Roles,
        roster: Roster,
        pool: BlockPool,
        matches: Matches,
        builder: StepBuilder,
    ) -> None:
        self._roles, self._roster, self._matches, self._builder = roles, roster, matches, builder
        self.kv, self._layout = KVView(pool, roster.paused), pool.layout
        self.now = 0.0
        self.step = -1
        self.lag = 0  # steps whose tokens have not come back

    def begin_step(self, step: int, now: float, lag: int) -> None:
        """The engine is about to plan: what the view shows is as of now."""
        self.step, self.now, self.lag = step, now, lag
        self._roster.begin_step()

    @property
    def running(self) -> tuple[Request, ...]:
        return self._roster.running_at_start

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests that want to start, preempted and paused ones included."""
        return self._roster.waiting_at_start

    @property
    def prefilling(self) -> list[Request]:
        """Running requests with more than one token to compute: the rest of a prompt or a recomputation."""
        return [r for r in self.running if r.num_tokens - r.num_computed_tokens - r.num_scheduled_tokens > 1]

    @property
    def num_running(self) -> int:
        return len(self._roster.running.items)

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting.items)

    @property
    def preempted(self) -> tuple[Request, ...]:
        return tuple(r for r in self.waiting if r.state is _PREEMPTED)

    @property
    def paused(self) -> tuple[Request, ...]:
        """Requests that wait with their blocks, in the order of pausing; unlike the others, as of now."""
        return tuple(self._roster.paused)

    @property
    def budget(self) -> Budget:
        return Budget(self._builder.tokens_left, self._builder.seqs_left)

    @property
    def planned(self) -> tuple[Sequence[int], Sequence[int]]:
        """(starts, lengths) of the chunks in this step so far: what `step_time` takes. Read, never write."""
        return self._builder.starts, self._builder.lengths

    def candidates(self, order: Order, window: int) -> Iterator[Request]:
        """Waiting requests as `order` ranks them, until `window` of them were looked at, those not counted
        that admission turned away in this step. Raises PolicyError for what does not wait and for a request
        that is named twice."""
        return self._checked(order, self._roles.calls.each(order, order.order, self), window)

    def _checked(self, order: Order, ranked: Iterator[Request], window: int) -> Iterator[Request]:
        calls, builder = self._roles.calls, self._builder
        named: set[int] = set()
        for request in ranked:
            known = isinstance(request, Request)
            if not known or not (request.state in WANT_TO_START or request in self.waiting):
                message = f"order() named {request!r}, which does not wait: name requests of view.waiting"
                raise calls.refusal(order, message)
            if request.index in named:
                raise calls.refusal(order, "order() named it twice in one step", request)
            named.add(request.index)
            turned_away = builder.num_turned_away
            yield request
            if builder.num_turned_away == turned_away:
                window -= 1
                if window <= 0:
                    return

    def match(self, request: Request) -> Match:
        """Cached prefix of a waiting request. Memoised across steps: O(1) while the cache is as it was."""
        return self._matches.match(request)

    def num_blocks_for(self, num_tokens: int) -> int:
        return self._layout.num_blocks(num_tokens)

    def step_time(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        """Predicted seconds of a step with these chunks, from the executor's cost model."""
        executor, calls = self._roles.executor, self._roles.calls
        if (model := executor.cost_model) is None:
            raise PolicyError(f"asked for step_time, but no cost model is there: {SERVICES['step_time']}")
        seconds = calls.call(executor, model.step_time, starts, lengths)
        if not is_finite(seconds):
            chunks = f"chunks of {list(lengths)[:8]} tokens: expected finite seconds"
            raise calls.refusal(executor, f"step_time() answered {seconds!r} for {chunks}")
        return seconds

    def predict(self, request: Request) -> LengthPrediction:
        """Predicted output length, from the `predictor` role."""
        if self._roles.predictor is None:
            message = "asked for a length prediction, but no predictor is chosen: "
            raise PolicyError(message + SERVICES["predictor"])
        return self._roles.predictor.predict(request)

    def describe(self) -> str:
        """The state as an error prints it."""
        kv = self.kv
        lines = [
            f"view: step={self.step} now={self.now:.6f} lag={self.lag} budget={tuple(self.budget)}",
            f"  kv: total={kv.total} free={kv.free} evictable={kv.evictable} pinned={kv.pinned} "
            f"block_size={kv.block_size}",
        ]
        for name, items in (("running", self._roster.running.items), ("waiting", self._roster.waiting.items)):
            first = "; ".join(map(repr, items[:4])) + (" ..." if len(items) > 4 else "")
            lines.append(f"  {name} ({len(items)}): {first}")
        return "\n".join(lines)
