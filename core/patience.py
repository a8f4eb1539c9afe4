"""Patience with policies that do nothing until some time: they may wait, but not for nothing."""

from __future__ import annotations

import math
from typing import Any

from .arrivals import ArrivalQueue
from .calls import Calls
from .clock import Clock

MOST_TURNS_AT_ONCE = 50  # with nothing done, because a policy asks to be woken at once
MOST_IDLE_TURNS = 1_000_000  # with nothing done, woken by policies at later times
# seconds until a turn that is asked for at once; doubled each time, so that virtual time moves
FIRST_NAP = 1e-9


class Patience:
    """Counts turns of the loop in which nothing was done, since something was."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._idle_turns = 0
        self._turns_at_once = 0  # of those, that a policy asked for without a time to wait for

    def renew(self) -> None:
        """Something was done: planned, rejected or arrived."""
        self._idle_turns = self._turns_at_once = 0

    def wait(
        self, clock: Clock, arrivals: ArrivalQueue, now: float, *, wake: float | None, waker: Any
    ) -> bool:
        """Until there may be something to do: at `wake`, if a policy asks for that, at the next arrival, or
        when something comes into the inbox. False if nothing can come."""
        if wake is not None:
            wake = self.next_turn(now, wake, waker)
        times = [t for t in (wake, arrivals.next_time) if t is not None]
        if times:
            clock.wait_until(min(times), arrivals.inbox)
        elif arrivals.expecting:
            arrivals.inbox.sleep(None)
        return bool(times) or arrivals.expecting

    def next_turn(self, now: float, wake: float, waker: Any) -> float:
        """When the next turn begins for a policy that does nothing until `wake`. One that asks for it at once
        is given time that grows, so that what it waits for may come. Raises PolicyError for one that waits
        for nothing."""
        self._idle_turns += 1
        if wake <= now:
            self._turns_at_once += 1
            wake = now + max(math.ulp(now), FIRST_NAP * 2.0**self._turns_at_once)
        if self._turns_at_once > MOST_TURNS_AT_ONCE or self._idle_turns > MOST_IDLE_TURNS:
            message = (
                f"asked {self._idle_turns} times in a row to be woken, {self._turns_at_once} times not after "
                "now, "
                f"and nothing was planned, rejected or arrived; now is {now}: let a request start, reject "
                "it, or "
                "wait until something changes"
            )
            raise self._calls.refusal(waker, message)
        return wake
