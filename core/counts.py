"""What a run counts, and the records of its steps and of itself."""

from __future__ import annotations

from typing import Any

from .blocks import BlockPool
from .execution import StepResult
from .flights import Flight
from .outputs import RunResult
from .outside import StepRecord
from .plan import StepPlan
from .roles import Roles
from .roster import Committed, Roster


class Counts:
    """Of the run in progress, or of the last one. Seconds are on the run's clock, if not CPU seconds."""

    def __init__(self, roles: Roles, roster: Roster, pool: BlockPool) -> None:
        self._roles, self._roster, self._pool = roles, roster, pool
        self._last_end = 0.0  # of a step, over all runs
        self.num_runs = 0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """A new run: everything counts from zero."""
        self.began = now
        self._prepared = self._roles.executor.preparation.late
        self.num_steps = 0
        self.planned_tokens = 0
        self.kv_peak = 0  # blocks
        self.policy_time = 0.0  # CPU seconds of planning and book-keeping, in the engine's thread
        self.busy_time = 0.0  # seconds in which a step ran
        self._pool.num_evictions = 0
        if self._roles.predictor is not None:
            self._roles.predictor.asked = False

    def launched(self, plan: StepPlan) -> None:
        self.planned_tokens += plan.num_tokens
        self.kv_peak = max(self.kv_peak, self._pool.num_used)

    def collected(self, result: StepResult, updating: float) -> None:
        """`updating`: CPU seconds that its book-keeping took."""
        self.policy_time += updating
        began = max(result.start, self._last_end)  # steps of a pipeline overlap
        self.busy_time += max(0.0, result.end - began)
        self._last_end = max(self._last_end, result.end)

    def record(
        self,
        flight: Flight,
        result: StepResult,
        done: Committed,
        *,
        now: float,
        updating: float,
    ) -> StepRecord:
        """A step that has come back, as callbacks and observers see it."""
        return StepRecord(
            step=flight.plan.step,
            plan=flight.plan,
            start=result.start,
            end=now,
            tokens=done.tokens,
            emitted=done.emitted,
            policy_time=flight.spent + updating,
            num_running=len(self._roster.running),
            num_waiting=len(self._roster.waiting),
            kv_used=self._pool.num_used,
            kv_cached=self._pool.num_cached,
            num_preempted=len(flight.plan.preempted),
            num_evicted=flight.num_evicted,
            timings=result.timings,
        )

    def result(self, now: float, **about: Any) -> RunResult:
        """`about`: what else the engine says of the run."""
        num_evictions, prepared = self._pool.num_evictions, self._roles.executor.preparation
        return RunResult(
            outputs=sorted(self._roster.finished, key=lambda output: output.index),
            duration=now - self.began,
            num_steps=self.num_steps,
            policy_time=self.policy_time,
            busy_time=self.busy_time,
            kv_total=self._pool.num_blocks,
            kv_peak=self.kv_peak,
            num_evictions=num_evictions,
            num_preemptions=self._roster.num_preemptions,
            num_pauses=self._roster.num_pauses,
            planned_tokens=self.planned_tokens,
            saw_truth=self._roles.saw_truth(num_evictions),
            warmup_seconds=prepared.seconds,
            late_preparations=prepared.late - self._prepared,
            step_time_basis=self._roles.executor.step_time_basis,
            time_model=self._roles.executor.time_model,
            **about,
        )
