"""The executor's contract: what the engine asks of whatever runs its plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .execution import ExecutorCaps, Preparation, StepResult
from .policy import CostModel, Role

if TYPE_CHECKING:
    from .plan import StepPlan


class Executor(Role):
    """Runs plans, in the order in which they were launched. The executor owns the clock."""

    role = "executor"
    caps: ExecutorCaps
    clock: Any
    cost_model: CostModel | None = None

    @property
    def step_time_basis(self) -> str:
        """What `cost_model` predicts from, for the reader of results; empty without one."""
        return ""

    def kv_capacity(self, block_size: int) -> int:
        """Blocks that fit into the memory left after the weights."""
        raise NotImplementedError

    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int) -> None:
        """Allocates the KV cache. Called once, before the first launch."""

    @property
    def preparation(self) -> Preparation:
        """So far; read when a run begins and when it ends. An executor that has nothing to prepare leaves this as it is."""
        return Preparation()

    def launch(self, plan: StepPlan) -> Any:
        """Starts the step and returns a ticket; must not wait for the device."""
        raise NotImplementedError

    def linger(self) -> None:
        """Asked before a plan that will wait behind steps in flight: returns when the device is about to run out of work, so
        that what arrives meanwhile can be in the plan. An executor that cannot tell returns at once."""

    def collect(self, ticket: Any) -> StepResult:
        """Waits for that step. Tickets are collected in the order of launch."""
        raise NotImplementedError

    def read_blocks(self, blocks: Sequence[int]) -> Any:
        """What these KV blocks hold when every step launched so far is done, for `write_blocks` of another executor of the
        same model."""
        raise ConfigError(f"{self.plugin_name} cannot hand KV to another engine")

    def write_blocks(self, blocks: Sequence[int], content: Any, first: int) -> None:
        """Fills these KV blocks, before the next step, with what `content` holds from its block number `first` on."""
        raise ConfigError(f"{self.plugin_name} cannot take KV from another engine")

    def close(self) -> None:
        """Gives memory and other processes back. Called once, however the run ended."""
