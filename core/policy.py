"""The roles: base classes for plugin authors. One object fills one role, or several that share state.

A plugin is a dataclass: its fields are its parameters and the only source of their defaults; its first
docstring line is what `python -m headway plugins` shows. State is made in `setup`, never in field defaults
that a user could set:

    @dataclass
    class ShortestFirst(Order):
        '''Shortest prompt first.'''
        max_age: float = param(10.0, above=0, unit="seconds")
        def order(self, view):
            return sorted(view.waiting, key=lambda r: r.num_prompt_tokens)

Rules every policy follows: time comes from `view.now` alone; no clock, no `set` order, no salted `hash()`, no
rank; chance from `self.rng`; requests and blocks are read, never written. `python -m headway check` finds the
ones that don't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import wraps
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .blocks import Block
from .compose.params import check
from .errors import ConfigError, PluginError
from .request import Request

if TYPE_CHECKING:
    from .context import Context
    from .outside import StepRecord
    from .step import StepBuilder
    from .view import View

API_VERSION = 1

#: What a role may require: service -> how to get it where it is missing.
SERVICES = {
    "predictor": "set predictor=NAME, one of those that `python -m headway plugins` lists",
    "step_time": "use an executor that has a cost model",
    "future": "use a workload that knows its arrivals beforehand",
    "slo": "set slo.ttft, slo.tpot or slo.e2el, or workload.slo_tiers",
}
PREEMPTION_MODES = ("recompute", "drop_tail")

#: Every role: config node -> what it decides. The order is the order of composition.
ROLES = {
    "scheduler": "what does this step contain?",
    "order": "which waiting request first?",
    "victim": "whom to preempt, and how?",
    "chunk": "how many tokens of a prompt in this step?",
    "admission": "take, defer or refuse a request?",
    "predictor": "how long will the answer be?",
    "cache": "which blocks already hold this prefix?",
    "eviction": "which evictable block goes first?",
    "retention": "what happens to blocks after a request ends?",
    "executor": "run the plan",
    "kernels": "attention, KV store, norms, rope, sampling",
    "parallel": "who holds which weights, who talks when?",
    "workload": "which requests arrive, and when?",
    "tracking": "where do results go, beside the run's own directory?",
}


class Role:
    """Base of every policy. The engine calls only the callbacks that a subclass overrides."""

    role: ClassVar[str] = ""
    api: ClassVar[int] = API_VERSION
    sees_truth: ClassVar[bool] = False  # True: sees true output lengths or the future; stamped on the results
    # why a request may wait without end, where that is by design; the conformance kit notes it
    may_starve: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()  # what it cannot work without: see SERVICES
    plugin_name: str = ""
    rng: Random

    def __init_subclass__(cls, **options: Any) -> None:
        """A plugin's own `__post_init__` finds parameters that are right already."""
        super().__init_subclass__(**options)
        if "oracle" in vars(cls):
            raise PluginError(f"{cls.__qualname__}: `oracle` is called `sees_truth` now")
        if (own := vars(cls).get("__post_init__")) is not None:
            setattr(cls, "__post_init__", _after_check(own))  # noqa: B010 - mypy takes no assignment to a method

    def __post_init__(self) -> None:
        _check_parameters(self)

    def setup(self, ctx: Context) -> None:
        """Once, after all roles are built. Make state here; call super().setup(ctx)."""

    def on_arrival(self, request: Request, now: float) -> None:
        """Called when the request joins the waiting queue; those that can never run are rejected before."""

    def on_admit(self, request: Request, now: float) -> None:
        """Called when the request starts to run, for the first time or after a preemption;
        `request.num_computed_tokens` holds its prefix hit."""

    def on_step_end(self, record: StepRecord) -> None:
        """Called after each completed step: counts are updated, full blocks published, ends reported."""

    def on_preempt(self, request: Request, now: float) -> None:
        """Called when a running request goes back to the waiting queue, with its generated tokens; one that
        is paused (`request.state`) keeps its blocks, too."""

    def on_finish(self, request: Request, now: float) -> None:
        """Called when the request has ended: finished, rejected by a policy, or aborted (`request.state`)."""


def _check_parameters(role: Role) -> None:
    if is_dataclass(role):
        check(role, "tracking" if role.role == "observer" else role.role)


def _after_check(own: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(own)
    def checks_first(self: Role) -> None:
        _check_parameters(self)
        own(self)

    return checks_first


CALLBACKS = ("on_arrival", "on_admit", "on_step_end", "on_preempt", "on_finish")


# ---- scheduling ------------------------------------------------------------------------------------------


class Scheduler(Role):
    """What does this step contain? See StepBuilder for the verbs."""

    role = "scheduler"
    window: ClassVar[int] = 256  # candidates of the order that one step may look at

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._order: Order = ctx.roles["order"]

    def order(self, view: View) -> Iterator[Request]:
        """Waiting requests, as the `order` role ranks them; at most `window` of them, not counting those that
        admission turns away."""
        return view.candidates(self._order, self.window)

    def plan(self, step: StepBuilder, view: View) -> None:
        """Fills the step with `step.add`, whose answer says what was granted. An empty step needs a reason:
        see `step.wake_at`.

        A walk over `self.order(view)` ends when the answer is NoBudget or NeedBlocks, which holds for
        everybody behind as well, and goes on after NotReady, which is about this request alone."""
        raise NotImplementedError

    def tail_blocks(self, request: Request) -> int:
        """Blocks that `step.preempt(request, "drop_tail")` takes off its end, at least 1."""
        return max(1, len(request.block_table) // 4)

    def plan_share(self, num_requests: int, num_plans: int) -> int:
        """Requests that a plan holds at most, where a request in flight cannot be planned again and so many
        plans are in flight at once, as in a pipeline. At least 1. num_requests: those that run and wait."""
        return max(1, -(-num_requests // num_plans))


class Order(Role):
    """Which waiting request first? May be lazy: only a bounded window is consumed."""

    role = "order"

    def order(self, view: View) -> Iterable[Request]:
        """Requests of `view.waiting`, first to start first."""
        raise NotImplementedError

    def rank_at(self, now: float) -> Callable[[Request], Any] | None:
        """How it compares any two requests at this time, waiting or running: the smaller goes first. None for
        a queue discipline, which says nothing of those that run."""
        return None


@dataclass(frozen=True, slots=True)
class Need:
    """A running request that lacks blocks; or, where paused ones are asked for, one that wants to start."""

    request: Request
    blocks: int


class Victim(Role):
    """Whom to preempt when a running request lacks a block. The core skips requests already in this step.

    Naming the needy request itself preempts it and ends the search; so does running out of names.
    """

    role = "victim"
    mode: str = "recompute"  # or "drop_tail": keep the head blocks, recompute only the tail

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self.mode not in PREEMPTION_MODES:  # a victim without the parameter sets it by hand
            raise ConfigError(f"victim.mode={self.mode!r}: expected one of {', '.join(PREEMPTION_MODES)}")

    def most_preemptions(self, max_num_seqs: int) -> int:
        """Preemptions in a row without a single token, after which it counts as a livelock: from then on the
        oldest is no victim and nobody new starts, until a token comes out."""
        return 2 * max_num_seqs + 8

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        """Requests of `view.running`, first to go first; preempted one by one until `need` is met."""
        raise NotImplementedError

    def paused(self, need: Need, view: View) -> Iterable[Request]:
        """Requests of `view.paused`, first to lose its blocks first: all of them before anybody who runs."""
        return reversed(view.paused)


class ChunkSize(Role):
    """How many tokens of an unfinished prompt may this step take? Asked by `step.add`, never for a decode."""

    role = "chunk"

    def tokens(self, request: Request, left: int, view: View) -> int:
        """At most `left`; 0 means not in this step."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Admit:
    """It may start."""


@dataclass(frozen=True, slots=True)
class Defer:
    """Not yet. `until` (seconds on the run's clock) wakes the engine when it would otherwise idle; a time
    that has passed asks again at once, but not for ever: who does nothing else is stopped."""

    until: float | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """Never; `reason` is what the user reads."""

    reason: str


class Admission(Role):
    """Take, defer or refuse? Asked when a request arrives, and each time a scheduler tries to start it."""

    role = "admission"
    #: True: also asked before a preempted request starts again, which may be deferred but not rejected.
    readmits: ClassVar[bool] = False

    def admit(self, request: Request, view: View) -> Admit | Defer | Reject:
        """The answer for now. How often it is asked is up to the scheduler: nothing may hang on the count."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class LengthPrediction:
    """Predicted output tokens: the mean, and an upper quantile where the predictor has one."""

    mean: float
    upper: float


class Predictor(Role):
    """How long will the answer be?"""

    role = "predictor"

    def predict(self, request: Request) -> LengthPrediction:
        """Of the whole answer, tokens that are there already included."""
        raise NotImplementedError


# ---- KV blocks -------------------------------------------------------------------------------------------


class PrefixCache(Role):
    """Which blocks hold this prefix? An index over blocks, whose counts and eviction are the core's."""

    role = "cache"
    enabled: ClassVar[bool] = True  # False: the core never publishes
    subtree: bool = False  # True: any unreferenced block is evictable, and takes what hangs under it along

    def match(self, request: Request, known: list[int], limit: int) -> list[int]:
        """The cached blocks that continue `known` (already verified ids from the root) along
        `request.token_ids`, so that known + result has at most `limit` blocks. Equality of tokens must be
        checked, not only a hash."""
        raise NotImplementedError

    def insert(self, request: Request, parent: int, tokens: tuple[int, ...], block: int) -> int:
        """`block` now holds `tokens` after cached block `parent` (ROOT for the first). Returns the block that
        the index holds for this content: `block` itself, or a twin that was published before."""
        raise NotImplementedError

    def remove(self, block: int) -> None:
        """`block`, a leaf, is being evicted."""
        raise NotImplementedError


class Eviction(Role):
    """Which evictable block goes first?

    A block is evictable between `on_evictable` and the next `on_in_use` or `on_evict`: cached, unreferenced,
    unpinned and without cached children, unless `cache.subtree` (the core tracks all of that). Hits, times
    and depth are on the Block.
    """

    role = "eviction"
    now: float = 0.0  # seconds on the run's clock, in every callback and in `candidates`; the pool keeps it

    def on_insert(self, block: Block) -> None:
        """It joined the prefix index, still held by the request that computed it."""

    def on_hit(self, block: Block) -> None:
        """A request was given it as a prefix hit."""

    def on_evictable(self, block: Block) -> None:
        """From now on it may be yielded."""

    def on_in_use(self, block: Block) -> None:
        """No longer: it was acquired, or a child was published under it."""

    def on_evict(self, block: Block) -> None:
        """It left the prefix index."""

    def candidates(self, n: int) -> Iterator[Block]:
        """Evictable blocks, first to go first. Each is evicted before the next one is asked for."""
        raise NotImplementedError


class KVControl(Protocol):
    """What a Retention policy may do with the blocks of a finished request."""

    def pin(self, request: Request, until: float) -> None:
        """Keeps them until that time (seconds on the run's clock), or until memory runs out."""

    def unpin(self, session: str) -> None:
        """Gives up every pin of a session."""

    def drop(self, request: Request) -> None:
        """Forgets those that nobody else holds."""


class Retention(Role):
    """What happens to a finished request's cached blocks? Default: they stay until evicted."""

    role = "retention"

    def retain(self, request: Request, kv: KVControl, now: float) -> None:
        """Called when `request` has finished, after its blocks are published and before they are released."""
