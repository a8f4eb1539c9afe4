"""The roles around a run: what arrives, and who watches. A step is decided without them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .execution import Tokens
from .plan import StepPlan
from .policy import Role
from .request import Request


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One completed step, as callbacks and observers see it. Times in seconds on the run's clock."""

    step: int
    plan: StepPlan
    start: float  # the executor began it
    end: float  # its tokens were on the host
    tokens: Tokens  # per planned request: those that it was given
    emitted: int  # tokens that reached requests
    policy_time: float  # CPU seconds of planning and book-keeping for this step (measured, not virtual)
    num_running: int
    num_waiting: int
    kv_used: int  # blocks
    kv_cached: int
    num_preempted: int
    num_evicted: int
    timings: dict[str, float] = field(default_factory=dict)  # the executor's own breakdown, seconds by phase


class Workload(Role):
    """Which requests arrive, and when?"""

    role = "workload"

    def check(self) -> None:
        """Raises WorkloadError for what can be known before a model is loaded: a file that is not there."""

    def arrivals(self, seed: int, vocab_size: int, max_model_len: int) -> Iterable[Any]:
        """Arrivals in order of time. May be lazy. Raise WorkloadError for what cannot be read."""
        raise NotImplementedError

    def on_result(self, request: Request, now: float) -> Iterable[Any]:
        """Closed loop: arrivals that follow a finished or rejected request (its next turn), with time >=
        now."""
        return ()


class Observer(Role):
    """Watches a run. Called after the step, in batches, off the critical path."""

    role = "observer"

    def on_build(self, run: Any) -> None:
        """The `headway.Run` that it will watch, if it is its `tracking`: before the first call of
        `on_start`."""

    def on_start(self, engine: Any) -> None:
        """The core.engine.Engine that is about to run."""

    def on_step(self, record: StepRecord) -> None:
        """After every completed step."""

    def on_requests(self, finished: Sequence[Request]) -> None:
        """Requests that ended since the last call: finished, rejected or aborted."""

    def close(self, result: Any) -> None:
        """Always called, also after Ctrl-C or an error; `result` is what there is."""
