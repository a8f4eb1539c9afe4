"""An executor that computes nothing: what is left of a run is what the core and the policies do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..clock import VirtualClock, VirtualServer
from ..context import CostModel
from ..execution import ExecutorCaps, StepResult, Tokens
from ..executor import Executor
from ..plan import StepPlan

TOKEN = 1  # sampled at every position, so that output_len and max_tokens alone end a request


@dataclass
class VirtualExecutor(Executor):
    """A step takes `overhead` + `per_token` * its tokens of virtual time, and next to no time of the host."""

    overhead: float = 0.01  # seconds
    per_token: float = 0.0  # seconds
    max_model_len: int = 1 << 16
    vocab_size: int = 1 << 20
    max_inflight: int = 2

    def __post_init__(self) -> None:
        self.caps = ExecutorCaps(self.max_model_len, self.vocab_size, max_inflight=self.max_inflight)
        self.clock = VirtualClock()
        self.cost_model: CostModel = self
        self.server = VirtualServer(self.clock)

    def step_time(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        return self.overhead + self.per_token * sum(lengths)

    def kv_capacity(self, block_size: int) -> int:
        return 1 << 20

    def launch(self, plan: StepPlan) -> Any:
        return plan.samples, *self.server.serve(self.step_time(plan.starts, plan.lengths))

    def collect(self, ticket: Any) -> StepResult:
        samples, begin, end = ticket
        return StepResult(Tokens([TOKEN if sample else -1 for sample in samples]), begin, end)
