"""The View: everything a policy may know at a step. Read-only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .blocks import BlockPool
from .clock import is_finite
from .errors import PolicyError
from .policy import SERVICES, LengthPrediction, Order
from .request import Request, RequestState

if TYPE_CHECKING:
    from .engine import Engine

_PREEMPTED = RequestState.PREEMPTED
_WANTS_TO_START = (RequestState.WAITING, RequestState.PREEMPTED)


class Match(NamedTuple):
    """Cached prefix of a waiting request, in whole blocks; the last prompt token is never part of it."""

    blocks: Sequence[int]
    num_tokens: int


class KVView:
    """Block counts, read-only."""

    __slots__ = ("_pool", "total", "block_size")

    def __init__(self, pool: BlockPool) -> None:
        self._pool, self.total, self.block_size = pool, pool.num_blocks, pool.block_size

    @property
    def free(self) -> int:
        return self._pool.num_free

    @property
    def evictable(self) -> int:
        return self._pool.num_evictable

    @property
    def available(self) -> int:
        return self._pool.num_available

    @property
    def used(self) -> int:
        return self._pool.num_used

    @property
    def pinned(self) -> int:
        return self._pool.num_pinned


class Budget(NamedTuple):
    tokens: int
    seqs: int


class View:
    """What a policy may know at this step. Read-only; lists are as the step began, in the order (arrival, index)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.kv = KVView(engine.pool)
        self.now = 0.0
        self.step = -1
        self.lag = 0  # steps whose tokens have not come back
        self._running: tuple[Request, ...] | None = None
        self._waiting: tuple[Request, ...] | None = None

    def _refresh(self, step: int, now: float, lag: int) -> None:
        self.step, self.now, self.lag = step, now, lag
        self._running = self._waiting = None

    def _freeze(self) -> None:
        """The core is about to change the lists: who has not looked yet shall still see how the step began."""
        self._running, self._waiting = self.running, self.waiting

    @property
    def running(self) -> tuple[Request, ...]:
        if self._running is None:
            self._running = tuple(self._engine.running.items)
        return self._running

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests that want to start, preempted ones included."""
        if self._waiting is None:
            self._waiting = tuple(self._engine.waiting.items)
        return self._waiting

    @property
    def prefilling(self) -> list[Request]:
        """Of the running requests, those with more than one token to compute: the rest of a prompt, or of a recomputation."""
        return [r for r in self.running if r.num_tokens - r.num_computed_tokens - r.num_scheduled_tokens > 1]

    @property
    def num_running(self) -> int:
        return len(self._engine.running.items)

    @property
    def num_waiting(self) -> int:
        return len(self._engine.waiting.items)

    @property
    def preempted(self) -> tuple[Request, ...]:
        return tuple(r for r in self.waiting if r.state is _PREEMPTED)

    @property
    def budget(self) -> Budget:
        builder = self._engine.builder
        return Budget(builder.tokens_left, builder.seqs_left)

    @property
    def planned(self) -> tuple[Sequence[int], Sequence[int]]:
        """(starts, lengths) of the chunks in this step so far: what `step_time` takes. Read, never write."""
        builder = self._engine.builder
        return builder._starts, builder._lengths

    def candidates(self, order: Order, window: int) -> Iterator[Request]:
        """Waiting requests as `order` ranks them, until `window` of them were looked at; those that admission turned away in this step do
        not count. Raises PolicyError for what does not wait and for a request that is named twice."""
        return self._checked(order, self._engine.guard.each(order, order.order, self), window)

    def _checked(self, order: Order, ranked: Iterator[Request], window: int) -> Iterator[Request]:
        guard, builder = self._engine.guard, self._engine.builder
        named: set[int] = set()
        for request in ranked:
            if not isinstance(request, Request) or not (request.state in _WANTS_TO_START or request in self.waiting):
                raise guard.refusal(order, f"order() named {request!r}, which does not wait: name requests of view.waiting")
            if request.index in named:
                raise guard.refusal(order, "order() named it twice in one step", request)
            named.add(request.index)
            turned_away = builder.num_turned_away
            yield request
            if builder.num_turned_away == turned_away:
                window -= 1
                if window <= 0:
                    return

    def match(self, request: Request) -> Match:
        """Cached prefix of a waiting request. Memoised across steps: O(1) while the cache did not change around it."""
        pool, cache = self._engine.pool, self._engine.cache
        if request.block_table:  # it runs, or drop_tail kept its head
            return Match((), request.num_computed_tokens)
        if not cache.enabled:
            return Match((), 0)
        limit = (request.num_tokens - 1) // pool.block_size  # the last token is always computed
        blocks = pool.blocks
        known: list[int] = []
        if request._match is not None:
            # The deepest block that is still the one we matched vouches for all before it: ancestors of a cached block
            # are cached. Its version tells whether something was published under it since.
            known, generations, version, memo_limit = request._match
            n = len(known)
            while n and blocks[known[n - 1]].generation != generations[n - 1]:
                n -= 1
            if n == len(known) and limit == memo_limit and version == (blocks[known[-1]].version if known else pool.root_version):
                return Match(known, n * pool.block_size)
            known = known[:n]
        if len(known) < limit:
            found = self._engine.guard.call(cache, cache.match, request, known, limit)
            if not isinstance(found, list) or len(known) + len(found) > limit or not all(map(pool.is_cached, found)):
                raise self._engine.guard.refusal(cache, f"match() answered {found}: expected at most {limit - len(known)} cached blocks", request)
            known = known + found
        version = blocks[known[-1]].version if known else pool.root_version
        request._match = (known, [blocks[b].generation for b in known], version, limit)
        return Match(known, len(known) * pool.block_size)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.kv.block_size)

    def step_time(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        """Predicted seconds of a step with these chunks, from the executor's cost model."""
        if (model := self._engine.cost_model) is None:
            raise PolicyError("asked for step_time, but this executor has no cost model: " + SERVICES["step_time"])
        seconds = model.step_time(starts, lengths)
        if not is_finite(seconds):
            message = f"step_time() answered {seconds!r} for chunks of {list(lengths)[:8]} tokens: expected finite seconds"
            raise self._engine.guard.refusal(self._engine.executor, message)
        return seconds

    def predict(self, request: Request) -> LengthPrediction:
        """Predicted output length, from the `predictor` role."""
        predictor = self._engine.predictor
        if predictor is None:
            raise PolicyError("asked for a length prediction, but no predictor is chosen: " + SERVICES["predictor"])
        prediction: LengthPrediction = predictor.predict(request)
        return prediction

    def describe(self) -> str:
        """The state as an error prints it."""
        kv = self.kv
        lines = [
            f"view: step={self.step} now={self.now:.6f} lag={self.lag} budget={tuple(self.budget)}",
            f"  kv: total={kv.total} free={kv.free} evictable={kv.evictable} pinned={kv.pinned} block_size={kv.block_size}",
        ]
        for name, items in (("running", self._engine.running.items), ("waiting", self._engine.waiting.items)):
            lines.append(f"  {name} ({len(items)}): " + "; ".join(map(repr, items[:4])) + (" ..." if len(items) > 4 else ""))
        return "\n".join(lines)
