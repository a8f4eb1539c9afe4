"""Room: blocks for a request that lacks them, and whose go when memory runs short.

who wants to start   free and evictable blocks, then those of paused requests, where that is enough
who runs             free and evictable blocks; those that come back with a step in flight; those of paused
                     requests; then running requests, as the victim role names them; at last heads that
                     preempted requests keep, and pins
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .blocks import BlockPool
from .policy import Need
from .request import Request, RequestState
from .roles import Roles
from .roster import Roster
from .view import View

_RUNNING, _PAUSED = RequestState.RUNNING, RequestState.PAUSED
_NOBODY_LEFT: Any = object()


class Room:
    """What `StepBuilder` asks before it plans tokens that need more blocks."""

    def __init__(self, roles: Roles, roster: Roster, pool: BlockPool) -> None:
        self._roles, self._roster, self._pool = roles, roster, pool

    def fits(self, request: Request, matched: Sequence[int], num_tokens: int, spare: int) -> bool:
        """Whether a waiting request may have blocks for so many tokens, and `spare` more are left."""
        missing = self._missing(request, matched, num_tokens) + spare
        return missing <= 0 or missing <= self._roster.paused.num_blocks(request, matched)

    def for_start(self, request: Request, matched: Sequence[int], num_tokens: int, step: int) -> int:
        """Blocks that a waiting request lacks to hold so many tokens, beside `matched`: at most 0 where it
        may have them. Paused requests give theirs only if that is enough."""
        missing = self._missing(request, matched, num_tokens)
        if missing <= 0 or missing > self._roster.paused.num_blocks(request, matched):
            return missing
        for other in self._paused(request, missing):
            if other is not request and not other.num_steps_in_flight:
                self._roster.take_paused(other, step)
                if self._missing(request, matched, num_tokens) <= 0:
                    break
        return self._missing(request, matched, num_tokens)

    def for_running(self, request: Request, need: int, step: int, now: float) -> int:
        """Preempts until `need` blocks are available; 0 when they are, else how many are missing."""
        roster, pool, victim = self._roster, self._pool, self._roles.victim
        paused, running = self._paused(request, need), self._victims(request, need)
        while need > pool.num_available:
            if need <= pool.num_available + roster.num_releasing_blocks:
                # blocks of preempted requests come back with the step in flight
                return need - pool.num_available
            if (other := next(paused, _NOBODY_LEFT)) is not _NOBODY_LEFT:
                roster.take_paused(other, step)
                continue
            other = next(running, _NOBODY_LEFT)
            if other is _NOBODY_LEFT or other is request:
                if roster.reclaim(request):
                    continue
                # Named by the policy, or the last one left. Alone, it starts over: what its kept head holds
                # (twins of published duplicates too) may be just what it lacks.
                self.preempt(
                    request, victim.mode if len(roster.running) > 1 else "recompute", need, step, now
                )
                return max(1, need - pool.num_available)
            planned = isinstance(other, Request) and other.planned_step == step
            if not isinstance(other, Request) or not (other.state is _RUNNING or planned):
                message = f"victims() named {other!r}, which does not run: yield requests of view.running"
                raise self._roles.calls.refusal(victim, message, request)
            if planned:
                continue
            self.preempt(other, victim.mode, need - pool.num_available, step, now)
        return 0

    def preempt(self, request: Request, mode: str, blocks: int, step: int, now: float) -> None:
        """Takes a running request's blocks; "drop_tail" leaves it all but the last `blocks`."""
        keep = max(0, len(request.block_table) - blocks) if mode == "drop_tail" else 0
        self._roster.preempt(request, step, keep, now)

    def _missing(self, request: Request, matched: Sequence[int], num_tokens: int) -> int:
        """Blocks that a waiting request lacks to hold `num_tokens`, less those that it may have."""
        pool = self._pool
        need = pool.layout.num_blocks(num_tokens) - (len(request.block_table) or len(matched))
        # evictable now, but not for this request
        idle = sum(1 for b in matched if not pool.blocks[b].ref_count)
        return need - (pool.num_available - idle - self._roster.num_reserved_blocks)

    def _victims(self, request: Request, need: int) -> Iterator[Any]:
        """Who may be preempted for a request, first to go first."""
        if self._roster.thrashing:  # from here on the oldest is safe until a token comes out
            return reversed(self._view.running)
        victim = self._roles.victim
        return self._roles.calls.each(victim, victim.victims, Need(request, need), self._view)

    def _paused(self, request: Request, need: int) -> Iterator[Request]:
        """Paused requests, first to lose their blocks first: as the victim role names them, then whom it left
        out."""
        if not self._roster.paused:
            return
        calls, victim = self._roles.calls, self._roles.victim
        for other in calls.each(victim, victim.paused, Need(request, need), self._view):
            if not isinstance(other, Request) or other.state is not _PAUSED:
                message = (
                    f"paused() named {other!r}, which is not paused: yield requests of view.paused, each once"
                )
                raise calls.refusal(victim, message, request)
            yield other
        yield from reversed(list(self._roster.paused))

    @property
    def _view(self) -> View:
        view = self._roles.calls.view
        assert view is not None
        return view
