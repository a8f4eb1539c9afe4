"""StepBuilder: all that a policy can do in a step, and the only mutator.

It makes the illegal impossible. `add` checks budget, sequence cap and block supply, matches the prefix, allocates,
evicts when short, asks the victim role when a running request still lacks a block, and answers. A policy can neither
over-allocate nor forget to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import spans
from .clock import is_finite
from .errors import PolicyError, near
from .plan import Allocation, StepPlan
from .policy import PREEMPTION_MODES, Admission, Admit, Defer, Need, Reject, Role, TokenBudget, Victim
from .request import Request, RequestState

if TYPE_CHECKING:
    from .engine import Engine

_RUNNING, _WAITING, _PREEMPTED = RequestState.RUNNING, RequestState.WAITING, RequestState.PREEMPTED


# ---- answers of StepBuilder.add ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """`n` tokens are in the step; `cached` tokens of the prompt came from the prefix cache (admissions only)."""

    n: int
    cached: int = 0

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Refused:
    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class NoBudget(Refused):
    """Nobody else fits into this step: no tokens or sequences are left, or too many requests run already. Ends a walk over those that wait."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class NeedBlocks(Refused):
    """`k` blocks are missing, or come back with a step in flight. Ends a walk: who comes later must not take what this one waits for."""

    k: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class NotReady(Refused):
    """This request alone cannot go on now: its tokens are in flight, or admission defers or rejects it. A walk goes on to the next one."""

    reason: str = ""


Grant = Granted | NoBudget | NeedBlocks | NotReady
_ONE = Granted(1)
_NO_BUDGET = NoBudget()
_IN_FLIGHT = NotReady("its next token is in flight")
_NOBODY_LEFT: Any = object()
_THRASHING = NoBudget("requests preempt each other without emitting a token: nobody starts until one does")


class StepBuilder:
    """The only mutator. Reset by the engine before each plan."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pool = engine.pool
        self._block_size = engine.pool.block_size
        self._placeholders = engine.placeholders
        self.step = -1
        self.tokens_left = 0
        self.seqs_left = 0
        self._now = 0.0
        self._by_policy: set[int] = set()
        self._num_turned_away = 0
        self._reset(-1, 0.0, 0, 0)

    def _reset(self, step: int, now: float, tokens: int, seqs: int) -> None:
        self.step, self._now, self.tokens_left, self.seqs_left = step, now, tokens, seqs
        self._requests: list[Request] = []
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._samples: list[bool] = []
        self._allocated: list[Allocation] = []
        self._admitted: list[Request] = []
        self._preempted: list[Request] = []
        self._num_turned_away = 0
        self._wake: float | None = None
        self._waker: Role | None = None  # who asked for the earliest wake
        if self._by_policy:
            self._by_policy = set()

    # ---- what a policy reads of the step so far ------------------------------------------------------------------

    @property
    def num_seqs(self) -> int:
        """Requests in this step so far."""
        return len(self._requests)

    @property
    def num_turned_away(self) -> int:
        """Times that admission deferred or rejected a request in this step so far."""
        return self._num_turned_away

    @property
    def num_tokens(self) -> int:
        """Tokens in this step so far."""
        return sum(self._lengths)

    def __contains__(self, request: Request) -> bool:
        return request._planned == self.step and request.state is _RUNNING

    def limit(self, tokens: int | None = None, seqs: int | None = None) -> None:
        """Lowers what is left of this step; a policy's own token budget or batch cap. Never raises it."""
        if tokens is not None:
            self.tokens_left = min(self.tokens_left, max(0, tokens))
        if seqs is not None:
            self.seqs_left = min(self.seqs_left, max(0, seqs))

    def admits(self, request: Request) -> bool:
        """Whether admission lets a waiting request start now. A scheduler that asks more than `add` before it starts one (`fits`, what
        is left of its own budget) asks this first: a request that admission defers then stops nobody behind it."""
        return request.state is not _WAITING or self._ask_admission(request) is None

    def fits(self, request: Request) -> bool:
        """Whether blocks for all known tokens of a waiting request are available now: what a scheduler that runs prompts
        to completion asks before it starts one."""
        need, available = self._supply(request, self._engine.view.match(request).blocks, request.num_tokens)
        return need <= available

    # ---- the verbs ----------------------------------------------------------------------------------------------

    def add(self, request: Request, num_tokens: int | None = None) -> Grant:
        """Plans the request's next token, or its next chunk of at most `num_tokens`.

        A running request that lacks a block evicts, then preempts whom the victim role names, itself last.
        A waiting request is admitted only into free or evictable blocks.
        Raises PolicyError for a request planned twice, preempted by this policy in this step, or ended.
        """
        known, scheduled = request.num_tokens, request.num_scheduled_tokens
        start = request.num_computed_tokens + scheduled
        if (
            # The decode of a running request that has room in its last block: nearly every call, so it comes first.
            known - start == 1
            and request.state is _RUNNING
            and request._planned != self.step
            and self.tokens_left > 0
            and self.seqs_left > 0
            and known < request._limit
            and start < len(request.block_table) * self._block_size
            and (self._placeholders or not scheduled)
        ):
            request._planned = self.step
            request.num_scheduled_tokens = scheduled + 1
            request.num_tokens = known + 1
            request._in_flight += 1
            self.tokens_left -= 1
            self.seqs_left -= 1
            self._requests.append(request)
            self._starts.append(start)
            self._lengths.append(1)
            self._samples.append(True)
            return _ONE
        if num_tokens is not None and not num_tokens >= 1:  # NaN too
            raise self._error(f"add(num_tokens={num_tokens}): expected at least 1, or None for as many as fit", request)
        state = request.state
        if state is _RUNNING:
            return self._add_running(request, start, num_tokens)
        if state is _WAITING or state is _PREEMPTED:
            return self._add_waiting(request, num_tokens)
        raise self._error(f"add() of a request that is {state.value}: forget it in on_finish", request)

    def preempt(self, request: Request, mode: str = "recompute") -> None:
        """Takes a running request, not yet in this step, off the device. Its generated tokens are kept.

        "recompute" gives all its blocks back; "drop_tail" keeps its head blocks and gives back the last quarter.
        Blocks of a step in flight become free when that step has come back.
        """
        if request.state is not _RUNNING:
            raise self._error(f"preempt() of a request that is {request.state.value}: only running requests can be preempted", request)
        if request._planned == self.step:
            raise self._error("preempt() of a request that is already in this step", request)
        if mode not in PREEMPTION_MODES:
            raise self._error(f"preempt(mode={mode!r}): expected one of {PREEMPTION_MODES}.{near(str(mode), PREEMPTION_MODES)}", request)
        self._by_policy.add(request.index)
        self._preempt(request, mode, max(1, len(request.block_table) // 4))

    def reject(self, request: Request, reason: str) -> None:
        """Refuses a waiting request for good; it counts as an SLO miss."""
        if request.state is not _WAITING:
            raise self._error(f"reject() of a request that is {request.state.value}: only requests that never started can be rejected", request)
        self._engine._reject(request, reason)

    def wake_at(self, t: float) -> None:
        """A policy that idles on purpose says until when (seconds on the run's clock). A time that is not after now means the next
        turn; who asks for that again and again, and plans nothing, is stopped by the engine."""
        self._wake_at(t, self._engine.scheduler, "wake_at")

    # ---- how the verbs work -------------------------------------------------------------------------------------

    def _wake_at(self, t: float, waker: Role, verb: str) -> None:
        if not is_finite(t):
            raise self._engine.guard.refusal(waker, f"{verb}({t!r}): expected a finite time in seconds; now is {self._now}")
        if self._wake is None or t < self._wake:
            self._wake, self._waker = t, waker

    def _add_running(self, request: Request, start: int, at_most: int | None) -> Grant:
        if request._planned == self.step:
            raise self._error("planned twice in one step", request)
        if request.num_tokens >= request._limit:
            return _IN_FLIGHT  # its last token is being sampled
        new = request.num_tokens - start
        if new <= 0 or (not self._placeholders and len(request.token_ids) < request.num_tokens):
            return _IN_FLIGHT
        n = self._grantable(request, new, at_most)
        if n <= 0:
            return _NO_BUDGET
        need = -(-(start + n) // self._block_size) - len(request.block_table)
        if need > self._pool.num_available and (missing := self._make_room(request, need)):
            if request.state is _RUNNING:
                self._engine.owed[request.index] = need  # what it waits for is not for those who wait to start
            return NeedBlocks(missing)
        self._append(request, start, n, need)
        return Granted(n)

    def _add_waiting(self, request: Request, at_most: int | None) -> Grant:
        engine = self._engine
        if request._planned == self.step:
            if request.index in self._by_policy:
                raise self._error("planned after this policy preempted it in the same step", request)
            return NeedBlocks(-(-request.num_tokens // self._block_size), "preempted in this step")
        if request._in_flight:
            return NeedBlocks(-(-request.num_tokens // self._block_size), "its blocks are still in flight")
        if engine.thrashing and engine.running.items:
            return _THRASHING
        if len(engine.running) >= engine.max_num_seqs or self.tokens_left <= 0 or self.seqs_left <= 0:
            return _NO_BUDGET
        if request.state is _WAITING and (refusal := self._ask_admission(request)) is not None:
            return refusal
        matched, cached = engine.view.match(request)
        n = self._grantable(request, request.num_tokens - cached, at_most)
        if n <= 0:
            return _NO_BUDGET
        need, available = self._supply(request, matched, cached + n)
        if need > available:
            return NeedBlocks(need - available)
        first = request.state is _WAITING
        engine._admit(request, matched, cached)
        self._admitted.append(request)
        if request.block_table:
            self._allocated.append(Allocation(request, 0, list(request.block_table)))
        self._append(request, cached, n, need)
        return Granted(n, cached if first else 0)

    def _supply(self, request: Request, matched: Sequence[int], num_tokens: int) -> tuple[int, int]:
        """(blocks that a waiting request lacks to hold `num_tokens`, blocks that it may have)."""
        pool = self._pool
        need = -(-num_tokens // self._block_size) - (len(request.block_table) or len(matched))
        idle = sum(1 for b in matched if not pool.blocks[b].ref_count)  # evictable now, but not for this request
        return need, pool.num_available - idle - sum(self._engine.owed.values())

    def _grantable(self, request: Request, new: int, at_most: int | None) -> int:
        left = min(self.tokens_left, new) if self.seqs_left > 0 else 0
        if at_most is not None:
            left = min(left, at_most)
        budget: TokenBudget | None = self._engine.budget
        if budget is not None and left > 0 and new > 1:
            guard = self._engine.guard
            tokens = guard.call(budget, budget.tokens, request, left, self._engine.view)
            if not isinstance(tokens, int) or not 0 <= tokens <= left:
                raise guard.refusal(budget, f"tokens() answered {tokens!r}: expected 0 to {left}", request)
            left = tokens
        return left

    def _append(self, request: Request, start: int, n: int, need: int) -> None:
        if need > 0:
            blocks = self._pool.allocate(need)
            self._allocated.append(Allocation(request, len(request.block_table), blocks))
            request.block_table.extend(blocks)
            self._engine.owed.pop(request.index, None)
        if request._past:
            request.num_recomputed_tokens += spans.overlap(request._past, start, start + n)
        sample = start + n == request.num_tokens
        request._planned = self.step
        request.num_scheduled_tokens += n
        request._in_flight += 1
        if sample:
            request.num_tokens += 1  # a placeholder until the step comes back
        self.tokens_left -= n
        self.seqs_left -= 1
        self._requests.append(request)
        self._starts.append(start)
        self._lengths.append(n)
        self._samples.append(sample)

    def _ask_admission(self, request: Request) -> Grant | None:
        admission: Admission | None = self._engine.admission
        if admission is None:
            return None
        guard = self._engine.guard
        answer = guard.call(admission, admission.admit, request, self._engine.view)
        if isinstance(answer, Admit):
            return None
        self._num_turned_away += 1
        if isinstance(answer, Defer):
            if answer.until is not None:
                self._wake_at(answer.until, admission, "Defer")
            return NotReady("admission defers it")
        if isinstance(answer, Reject):
            self.reject(request, answer.reason)
            return NotReady(f"rejected: {answer.reason}")
        raise guard.refusal(admission, f"admit() answered {answer!r}: expected Admit, Defer or Reject", request)

    def _make_room(self, request: Request, need: int) -> int:
        """Preempts until `need` blocks are available; 0 when they are, else how many are missing."""
        engine, pool = self._engine, self._pool
        victim: Victim = engine.victim
        if engine.thrashing:  # from here on the oldest is safe until a token comes out
            candidates = reversed(engine.view.running)
        else:
            candidates = engine.guard.each(victim, victim.victims, Need(request, need), engine.view)
        while need > pool.num_available:
            if need <= pool.num_available + engine.num_releasing_blocks():
                return need - pool.num_available  # blocks of preempted requests come back with the step in flight
            other = next(candidates, _NOBODY_LEFT)
            if other is _NOBODY_LEFT or other is request:
                if engine._reclaim(request):
                    continue
                # Named by the policy, or the last one left. Alone, it starts over: what its kept head holds (twins of
                # published duplicates too) may be just what it lacks.
                self._preempt(request, victim.mode if len(engine.running) > 1 else "recompute", need)
                return max(1, need - pool.num_available)
            if not isinstance(other, Request) or (other.state is not _RUNNING and other._planned != self.step):
                raise engine.guard.refusal(victim, f"victims() named {other!r}, which does not run: yield requests of view.running", request)
            if other._planned == self.step:
                continue
            self._preempt(other, victim.mode, need - pool.num_available)
        return 0

    def _preempt(self, request: Request, mode: str, blocks: int) -> None:
        request._planned = self.step
        self._preempted.append(request)
        keep = max(0, len(request.block_table) - blocks) if mode == "drop_tail" else 0
        self._engine._preempt(request, keep)

    def _error(self, message: str, request: Request | None = None) -> PolicyError:
        engine = self._engine
        name = request.id if request else ""
        return PolicyError(message, plugin=engine.scheduler.plugin_name, step=self.step, request=name, view=engine.view.describe())

    def _build(self, left: list[Request]) -> StepPlan:
        return StepPlan(
            self.step, self._now, self._requests, self._starts, self._lengths, self._samples, sum(self._lengths),
            self._allocated, self._admitted, left, self._preempted,
        )  # fmt: skip
