"""Flights: plans that are launched and not collected, in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from .calls import Calls
from .clock import Clock, is_finite
from .errors import PolicyError
from .execution import StepResult
from .plan import StepPlan
from .policy import Executor


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched plan whose result has not been collected."""

    plan: StepPlan
    ticket: Any  # the executor's
    spent: float  # CPU seconds of planning it
    num_evicted: int  # blocks, for it


class Flights:
    """At most `max_inflight` at a time; the executor runs them in the order of launch."""

    def __init__(self, executor: Executor, calls: Calls, clock: Clock, max_inflight: int) -> None:
        self._executor, self._calls, self._clock, self.max_inflight = executor, calls, clock, max_inflight
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def full(self) -> bool:
        return len(self._flights) >= self.max_inflight

    def linger(self) -> None:
        """Before a plan that will wait behind steps in flight: returns when the executor says it is time."""
        if 0 < len(self._flights) == self.max_inflight - 1:
            self._calls.call(self._executor, self._executor.linger)

    def launch(self, plan: StepPlan, spent: float, num_evicted: int) -> None:
        ticket = self._calls.call(self._executor, self._executor.launch, plan)
        self._flights.append(Flight(plan, ticket, spent, num_evicted))

    def collect(self) -> tuple[Flight, StepResult]:
        """Waits for the first one, and moves virtual time to its end. An executor that fails here is not
        asked for the plans behind."""
        flight = self._flights[0]
        try:
            result = self._calls.call(self._executor, self._executor.collect, flight.ticket)
        except Exception:
            self._flights.clear()
            raise
        self._flights.popleft()
        self._check(flight.plan, result)
        self._clock.advance_to(result.end)
        return flight, result

    def discard(self) -> None:
        """Lets the executor finish its steps until it fails to; their tokens are dropped."""
        flights = list(self._flights)
        self._flights.clear()
        try:
            for flight in flights:
                self._clock.advance_to(self._executor.collect(flight.ticket).end)
        except (Exception, KeyboardInterrupt):
            return

    def _check(self, plan: StepPlan, result: StepResult) -> None:
        """One token for each chunk that samples, -1 for the others, and times that a clock can show."""
        samples, step = plan.samples, plan.step
        if not isinstance(result, StepResult):
            raise self._refusal(f"collect() answered {result!r}: expected a StepResult")
        tokens = result.tokens
        if len(tokens) != len(samples):
            requests = f"{len(samples)} requests in step {step}"
            raise self._refusal(f"collect() answered {len(tokens)} tokens for {requests}")
        if not (is_finite(result.start) and is_finite(result.end)):
            times = f"start={result.start} and end={result.end}"
            raise self._refusal(f"collect() answered {times} for step {step}: expected finite seconds")
        try:
            right = min(tokens) >= 0 if False not in samples else [token >= 0 for token in tokens] == samples
        except (TypeError, ValueError):
            right = False
        if not right:
            raise self._wrong_token(plan, result)

    def _wrong_token(self, plan: StepPlan, result: StepResult) -> PolicyError:
        def fits(token: Any, sample: bool) -> bool:
            return isinstance(token, int) and (token >= 0) == sample

        pairs = enumerate(zip(result.tokens, plan.samples, strict=True))
        wrong = next(i for i, (token, sample) in pairs if not fits(token, sample))
        expected = "a token id" if plan.samples[wrong] else "-1, since its chunk samples nothing"
        message = f"collect() answered {result.tokens[wrong]!r} in step {plan.step}: expected {expected}"
        return self._calls.refusal(self._executor, message, plan.requests[wrong])

    def _refusal(self, message: str) -> PolicyError:
        return self._calls.refusal(self._executor, message)
