"""StepBuilder: all that a policy can do in a step, and the only mutator.

It makes the illegal impossible. `add` checks budget, sequence cap and block supply, matches the prefix,
allocates, evicts when short, asks the victim role when a running request still lacks a block, and answers. A
policy can neither over-allocate nor forget to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .blocks import BlockPool
from .clock import is_finite
from .copies import Copies
from .drafts import plannable
from .errors import PolicyError, near
from .grants import Grant, Granted, NeedBlocks, NoBudget, NotReady
from .matching import Matches
from .plan import Allocation, StepPlan
from .policy import PREEMPTION_MODES, Admit, Reject, Role
from .request import WANT_TO_START, Request, RequestState
from .roles import Roles
from .room import Room
from .roster import Roster

if TYPE_CHECKING:
    from .view import View

_RUNNING, _WAITING, _PAUSED = RequestState.RUNNING, RequestState.WAITING, RequestState.PAUSED

_ONE = Granted(1)
_NO_BUDGET = NoBudget()
_IN_FLIGHT = NotReady("its next token is in flight")
_THRASHING = NoBudget("requests preempt each other without emitting a token: nobody starts until one does")


class StepBuilder:
    """The only mutator: all that a policy can do in a step. The engine begins it anew before each plan."""

    def __init__(self, roles: Roles, roster: Roster, pool: BlockPool, matches: Matches) -> None:
        self._roles, self._roster, self._pool, self._matches = roles, roster, pool, matches
        self.copies = Copies(pool, roles.executor.caps.tier_blocks)
        self._room = Room(roles, roster, pool)
        self.begin(-1, 0.0, 0, 0)

    def begin(self, step: int, now: float, tokens: int, seqs: int) -> None:
        """A new step with nothing in it. For the engine."""
        self.step, self._now, self.tokens_left, self.seqs_left = step, now, tokens, seqs
        self.requests: list[Request] = []  # in the step so far, parallel to the next three; read, never write
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.samples: list[bool] = []
        self.allocated: list[Allocation] = []
        self.admitted: list[Request] = []
        self.paused: list[Request] = []
        self.drafts: dict[int, Sequence[int]] = {}  # by place in the step
        self.num_turned_away = 0  # times that admission deferred or rejected a request in this step so far
        self.wake: float | None = None  # when the engine asks again at the latest, if nothing is planned
        self.waker: Role | None = None  # who asked for that
        self._by_policy: set[int] = set()

    def build(self, left: list[Request]) -> StepPlan:
        """What the executor runs. For the engine."""
        return StepPlan(
            step=self.step,
            now=self._now,
            requests=self.requests,
            starts=self.starts,
            lengths=self.lengths,
            samples=self.samples,
            num_tokens=sum(self.lengths),
            allocated=self.allocated,
            admitted=self.admitted,
            left=left,
            preempted=self._roster.take_preempted(),
            paused=self.paused,
            drafts=self.drafts,
            copies=self.copies.take() if self.requests else (),
        )

    # ---- what a policy reads of the step so far -----------------------------------------------------------

    @property
    def num_seqs(self) -> int:
        """Requests in this step so far."""
        return len(self.requests)

    @property
    def num_tokens(self) -> int:
        """Tokens in this step so far."""
        return sum(self.lengths)

    def __contains__(self, request: Request) -> bool:
        return request.planned_step == self.step and request.state is _RUNNING

    def limit(self, tokens: int | None = None, seqs: int | None = None) -> None:
        """Lowers what is left of this step; a policy's own token budget or batch cap. Never raises it."""
        if tokens is not None:
            self.tokens_left = min(self.tokens_left, max(0, tokens))
        if seqs is not None:
            self.seqs_left = min(self.seqs_left, max(0, seqs))

    def admits(self, request: Request) -> bool:
        """Whether admission lets a waiting request start now. A scheduler that asks more than `add` before it
        starts one (`fits`, what is left of its own budget) asks this first: a request that admission defers
        then stops nobody behind it."""
        return self._turned_away(request) is None

    def fits(self, request: Request, spare: int = 0) -> bool:
        """Whether blocks for all known tokens of a waiting request are available now, and `spare` more: what
        a scheduler that runs prompts to completion asks before it starts one."""
        return self._room.fits(request, self._matches.match(request).blocks, request.num_tokens, spare)

    # ---- the verbs ----------------------------------------------------------------------------------------

    def add(
        self, request: Request, num_tokens: int | None = None, drafts: Sequence[int] | None = None
    ) -> Grant:
        """Plans the request's next token, or its next chunk of at most `num_tokens`. `drafts` are guesses of
        the tokens behind its last known one, for a running request whose next one is to be sampled: as many
        of them as the executor verifies and as fit without preempting anybody are planned with it, and
        `Granted` counts them.

        A running request that lacks a block evicts, then preempts whom the victim role names, itself last.
        A waiting request is admitted only into free or evictable blocks.
        Raises PolicyError for a request planned twice, preempted by this policy in this step, or ended.
        """
        # A running request decodes and has room in its last block: nearly every call, so it comes first.
        if drafts is None and self._add_simple((request,)) is None:
            return _ONE
        if num_tokens is not None and not num_tokens >= 1:  # NaN too
            expected = "expected at least 1, or None for as many as fit"
            raise self._error(f"add(num_tokens={num_tokens}): {expected}", request)
        state = request.state
        if state is _RUNNING:
            return self._add_running(request, num_tokens, drafts or ())
        if state in WANT_TO_START:
            return self._add_waiting(request, num_tokens)
        raise self._error(f"add() of a request that is {state.value}: forget it in on_finish", request)

    def add_decodes(self, requests: Iterable[Request]) -> list[Request]:
        """Adds each of these that has one token to compute, in order, as `add` does; returns the others:
        prompts that are not done, and what was preempted meanwhile. Cheaper than a call per request."""
        prompts, rest = [], iter(requests)
        while (request := self._add_simple(rest)) is not None:
            if request.num_new_tokens > 1:
                prompts.append(request)
            elif request.state is _RUNNING:
                self._add_running(request, None, ())
            else:
                self.add(request)
        return prompts

    def preempt(self, request: Request, mode: str = "recompute") -> None:
        """Takes a running request, not yet in this step, off the device. Its generated tokens are kept.

        "recompute" gives all its blocks back; "drop_tail" keeps its head blocks and gives back as many as
        `Scheduler.tail_blocks` says.
        Blocks of a step in flight become free when that step has come back.
        """
        self._check_leaving(request, "preempt")
        if mode not in PREEMPTION_MODES:
            expected = f"expected one of {PREEMPTION_MODES}.{near(str(mode), PREEMPTION_MODES)}"
            raise self._error(f"preempt(mode={mode!r}): {expected}", request)
        tail = self._roles.tail_blocks(request) if mode == "drop_tail" else 0
        self._room.preempt(request, mode, tail, self.step, self._now)

    def pause(self, request: Request) -> None:
        """Sets a running request, not yet in this step, aside with its blocks: it waits, and goes on where it
        was.

        When memory runs short its blocks are the first to go, and it is like any other that was preempted."""
        self._check_leaving(request, "pause")
        self.paused.append(request)
        self._roster.pause(request, self.step, self._now)

    def reject(self, request: Request, reason: str) -> None:
        """Refuses a waiting request for good; it counts as an SLO miss."""
        if request.state is not _WAITING:
            only = "only requests that never started can be rejected"
            raise self._error(f"reject() of a request that is {request.state.value}: {only}", request)
        self._roster.reject(request, reason, self._now)

    def wake_at(self, t: float) -> None:
        """A policy that idles on purpose says until when (seconds on the run's clock). A time that is not
        after now means the next turn; who asks for that again and again, and plans nothing, is stopped by the
        engine."""
        self._wake_at(t, self._roles.scheduler, "wake_at")

    # ---- how the verbs work -------------------------------------------------------------------------------

    def _add_simple(self, requests: Iterable[Request]) -> Request | None:
        """Plans decodes that need no block, up to the first request that is none: that one, else None."""
        before, most = len(self.requests), min(self.tokens_left, self.seqs_left)
        other = self._roster.schedule_decodes(requests, self.step, most, self.requests, self.starts)
        if added := len(self.requests) - before:
            self.tokens_left -= added
            self.seqs_left -= added
            self.lengths += [1] * added
            self.samples += [True] * added
        return other

    def _check_leaving(self, request: Request, verb: str) -> None:
        if request.state is not _RUNNING:
            only = "only running requests can be preempted or paused"
            raise self._error(f"{verb}() of a request that is {request.state.value}: {only}", request)
        if request.planned_step == self.step:
            raise self._error(f"{verb}() of a request that is already in this step", request)
        self._by_policy.add(request.index)

    def _wake_at(self, t: float, waker: Role, verb: str) -> None:
        if not is_finite(t):
            message = f"{verb}({t!r}): expected a finite time in seconds; now is {self._now}"
            raise self._roles.calls.refusal(waker, message)
        if self.wake is None or t < self.wake:
            self.wake, self.waker = t, waker

    def _add_running(self, request: Request, at_most: int | None, drafts: Sequence[int]) -> Grant:
        if request.planned_step == self.step:
            raise self._error("planned twice in one step", request)
        if request.num_tokens >= request.max_num_tokens:
            return _IN_FLIGHT  # its last token is being sampled
        new = request.num_new_tokens
        one_at_a_time = request.waits_for_token or not self._roster.placeholders
        if new <= 0 or (one_at_a_time and len(request.token_ids) < request.num_tokens):
            return _IN_FLIGHT
        n = self._grantable(request, new, at_most)
        if n <= 0:
            return _NO_BUDGET
        start = request.num_computed_tokens + request.num_scheduled_tokens
        if drafts:
            most = min(self.tokens_left, at_most or self.tokens_left) - 1
            drafts = plannable(
                self._roles, self._roster, self._pool, request=request, drafts=drafts, most=most
            )
            n += len(drafts)
        need = self._pool.layout.num_blocks(start + n) - len(request.block_table)
        room = self._room
        if need > self._pool.num_available and (
            missing := room.for_running(request, need, self.step, self._now)
        ):
            if request.state is _RUNNING:
                self._roster.reserve(request, need)  # what it waits for is not for those who wait to start
            return NeedBlocks(missing)
        self._append(request, start, n, need, drafts)
        return _ONE if n == 1 else Granted(n)

    def _add_waiting(self, request: Request, at_most: int | None) -> Grant:
        roster = self._roster
        if request.planned_step == self.step:
            if request.index in self._by_policy:
                raise self._error("planned after this policy preempted it in the same step", request)
            return NeedBlocks(self._pool.layout.num_blocks(request.num_tokens), "preempted in this step")
        if request.num_steps_in_flight:
            if request.state is _PAUSED:
                return _IN_FLIGHT
            need = self._pool.layout.num_blocks(request.num_tokens)
            return NeedBlocks(need, "its blocks are still in flight")
        if roster.thrashing and roster.running.items:
            return _THRASHING
        if len(roster.running) >= roster.max_num_seqs or self.tokens_left <= 0 or self.seqs_left <= 0:
            return _NO_BUDGET
        first = request.state is _WAITING
        if (refusal := self._turned_away(request)) is not None:
            return refusal
        matched, cached = self._matches.match(request)
        n = self._grantable(request, request.num_tokens - cached, at_most)
        if n <= 0:
            return _NO_BUDGET
        if (missing := self._room.for_start(request, matched, cached + n, self.step)) > 0:
            return NeedBlocks(missing)
        roster.admit(request, matched, cached, self._now)
        self.admitted.append(request)
        if request.block_table:
            self.allocated.append(Allocation(request, 0, list(request.block_table)))
        need = self._pool.layout.num_blocks(cached + n) - len(request.block_table)
        self._append(request, cached, n, need)
        return Granted(n, cached if first else 0)

    def _grantable(self, request: Request, new: int, at_most: int | None) -> int:
        left = min(self.tokens_left, new) if self.seqs_left > 0 else 0
        if at_most is not None:
            left = min(left, at_most)
        return self._roles.prompt_tokens(request, left, self._view) if left > 0 and new > 1 else left

    def _append(self, request: Request, start: int, n: int, need: int, drafts: Sequence[int] = ()) -> None:
        blocks = self._pool.allocate(need) if need > 0 else []
        if blocks:
            self.allocated.append(Allocation(request, len(request.block_table), blocks))
        if drafts:
            self.drafts[len(self.requests)] = drafts
        self.samples.append(self._roster.schedule(request, self.step, start, n, blocks, len(drafts)))
        self.tokens_left -= n
        self.seqs_left -= 1
        self.requests.append(request)
        self.starts.append(start)
        self.lengths.append(n)

    def _turned_away(self, request: Request) -> Grant | None:
        """Asks admission; None when the request may start."""
        answer = self._roles.admit(request, self._view)
        if isinstance(answer, Admit):
            return None
        self.num_turned_away += 1
        if isinstance(answer, Reject):
            self.reject(request, answer.reason)
            return NotReady(f"rejected: {answer.reason}")
        if answer.until is not None and self._roles.admission is not None:
            self._wake_at(answer.until, self._roles.admission, "Defer")
        return NotReady("admission defers it")

    @property
    def _view(self) -> View:
        view = self._roles.calls.view
        assert view is not None
        return view

    def _error(self, message: str, request: Request) -> PolicyError:
        return self._roles.calls.refusal(self._roles.scheduler, message, request)
