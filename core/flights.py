"""Flights: plans that are launched and not collected, in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from .calls import Calls
from .clock import Clock, is_finite
from .errors import PolicyError
from .execution import StepResult, Tokens
from .executor import Executor
from .plan import StepPlan
from .roles import Roles
from .roster import Roster


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

    def seqs_of_a_plan(self, roles: Roles, roster: Roster, at_most: int) -> int:
        """A request in flight that cannot be planned again leaves each plan its share of the requests."""
        if roster.placeholders or self.max_inflight == 1:
            return at_most
        share = roles.plan_share(len(roster.running) + len(roster.waiting), self.max_inflight)
        return min(share, at_most)

    def linger(self) -> None:
        """Before a plan that will wait behind steps in flight: returns when the executor says it is time."""
        if 0 < len(self._flights) == self.max_inflight - 1:
            self._calls.call(self._executor, self._executor.linger)

    def launch(self, plan: StepPlan, spent: float, num_evicted: int) -> None:
        ticket = self._calls.call(self._executor, self._executor.launch, plan)
        self._flights.append(Flight(plan, ticket, spent, num_evicted))

    def collect(self) -> tuple[Flight, StepResult, Tokens]:
        """Waits for the first one, and moves virtual time to its end. An executor that fails here is not
        asked for the plans behind."""
        flight = self._flights[0]
        try:
            result = self._calls.call(self._executor, self._executor.collect, flight.ticket)
        except Exception:
            self._flights.clear()
            raise
        self._flights.popleft()
        tokens = self._checked(flight.plan, result)
        self._clock.advance_to(result.end)
        return flight, result, tokens

    def discard(self) -> None:
        """Lets the executor finish its steps until it fails to; their tokens are dropped."""
        flights = list(self._flights)
        self._flights.clear()
        try:
            for flight in flights:
                self._clock.advance_to(self._executor.collect(flight.ticket).end)
        except (Exception, KeyboardInterrupt):
            return

    def _checked(self, plan: StepPlan, result: StepResult) -> Tokens:
        """Tokens for each chunk that samples, none for the others, and times that a clock can show."""
        samples, step = plan.samples, plan.step
        if not isinstance(result, StepResult):
            raise self._refusal(f"collect() answered {result!r}: expected a StepResult")
        tokens = self._flat(plan, result.tokens)
        if len(tokens) != len(samples):
            requests = f"{len(samples)} requests in step {step}"
            raise self._refusal(f"collect() answered {len(tokens)} lists of tokens for {requests}")
        if not (is_finite(result.start) and is_finite(result.end)):
            times = f"start={result.start} and end={result.end}"
            raise self._refusal(f"collect() answered {times} for step {step}: expected finite seconds")
        first = tokens.first
        try:
            right = (
                min(first) >= 0
                if samples.count(True) == len(samples)
                else [token >= 0 for token in first] == samples
            )
        except (TypeError, ValueError):
            right = False
        if not right:
            self._refuse_first(plan, tokens)
        if tokens.more:
            self._check_more(plan, tokens)
        return tokens

    def _flat(self, plan: StepPlan, tokens: Any) -> Tokens:
        if isinstance(tokens, Tokens):
            return tokens
        try:
            return Tokens.of(tokens)
        except (TypeError, LookupError):
            expected = "expected a list of tokens per planned request"
            raise self._refusal(f"collect() answered {tokens!r} in step {plan.step}: {expected}") from None

    def _refuse_first(self, plan: StepPlan, tokens: Tokens) -> None:
        def fits(token: Any, sample: bool) -> bool:
            return isinstance(token, int) and (token >= 0) == sample

        pairs = enumerate(zip(tokens.first, plan.samples, strict=True))
        wrong = next(i for i, (token, sample) in pairs if not fits(token, sample))
        expected = "a token id" if plan.samples[wrong] else "none, since its chunk samples nothing"
        answer = "no token" if (token := tokens.first[wrong]) == -1 else repr(token)
        message = f"collect() answered {answer} in step {plan.step}: expected {expected}"
        raise self._calls.refusal(self._executor, message, plan.requests[wrong])

    def _check_more(self, plan: StepPlan, tokens: Tokens) -> None:
        """Several tokens at once are token ids, and no more than the executor says it gives, drafts aside."""
        for place, rest in tokens.more.items():
            most = self._executor.caps.tokens_per_step + len(plan.drafts.get(place, ()))
            right = all(isinstance(token, int) and token >= 0 for token in rest) and tokens.first[place] >= 0
            if not right or len(rest) >= most:
                message = f"collect() answered {[tokens.first[place], *rest]} in step {plan.step}: "
                message += (
                    f"expected at most {most} token ids (ExecutorCaps.tokens_per_step, and the plan's drafts)"
                )
                raise self._calls.refusal(self._executor, message, plan.requests[place])

    def _refusal(self, message: str) -> PolicyError:
        return self._calls.refusal(self._executor, message)
