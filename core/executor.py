"""The executor's contract: what the engine asks of whatever runs its plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .compose.config import EngineConfig, Hardware, ModelConfig, ModelShape, ParallelConfig
from .context import CostModel
from .errors import ConfigError
from .execution import ExecutorCaps, Preparation, StepResult, TimeModel
from .outputs import StopText
from .policy import Role

if TYPE_CHECKING:
    from .plan import StepPlan


def _nothing_known() -> dict[str, Any]:
    raise ConfigError("this run was composed by hand, so no facts of it are known")


def _by_name(name: str) -> Any:
    raise ConfigError(f"{name!r}: this run was composed by hand, and no registry was given to look it up in")


@dataclass(frozen=True)
class BuildContext:
    """What a run is made of, as far as it concerns its executor."""

    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: Hardware = field(default_factory=Hardware)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    kernels: Any = None  # the kernels role; None without one
    # another kernels role with its defaults, for a composition of several
    kernels_named: Callable[[str], Any] | None = None
    # another executor with its defaults, not built yet: to wrap it
    executor_named: Callable[[str], Executor] = _by_name
    # every choice and parameter of the run (`composition_facts`)
    facts: Callable[[], dict[str, Any]] = _nothing_known

    @property
    def shape(self) -> ModelShape:
        """Of the model, from its checkpoint where it is here. Raises ConfigError where it is not known."""
        return self.model.shape()


class Executor(Role):
    """Runs plans, in the order in which they were launched. The executor owns the clock."""

    role = "executor"
    several_ranks: ClassVar[bool] = False  # takes parallel.tp and parallel.pp above 1
    torchrun: ClassVar[bool] = False  # its ranks may be started by torchrun
    caps: ExecutorCaps
    clock: Any
    cost_model: CostModel | None = None
    # of the model: encode, answer, has_chat_template, encode_chat; None where it has none
    tokenizer: Any = None

    def check(self, context: BuildContext) -> ExecutorCaps | None:
        """Raises HeadwayError for what can be known to be wrong without weights, ranks or a download. Answers
        what is known of `caps`, so that a sweep's limits are checked before its first job; None for
        nothing."""
        return getattr(self, "caps", None)

    def build(self, context: BuildContext) -> Executor:
        """Makes it ready to run: afterwards `caps`, `clock` and `kv_capacity` hold. Answers who runs the
        plans: itself, or an executor that wraps it or another one."""
        return self

    def limits(self, context: BuildContext) -> EngineConfig:
        """The engine's limits of a run on it: those that are given, unless it knows better. Raises
        HeadwayError."""
        return context.engine

    @property
    def stop_text(self) -> StopText | None:
        """Decides stop strings, for which it takes a tokenizer; None where nobody can."""
        return None

    @property
    def step_time_basis(self) -> str:
        """What `cost_model` predicts from, for the reader of results; empty without one."""
        return ""

    @property
    def time_model(self) -> TimeModel | None:
        """Where the times of its steps come from, if they are simulated."""
        return None

    def kv_capacity(self, block_size: int) -> int:
        """Blocks that fit into the memory left after the weights."""
        raise NotImplementedError

    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int
    ) -> None:
        """Allocates the KV cache. Called once, before the first launch."""

    @property
    def preparation(self) -> Preparation:
        """So far; read when a run begins and when it ends. An executor that has nothing to prepare leaves
        this as it is."""
        return Preparation()

    def launch(self, plan: StepPlan) -> Any:
        """Starts the step and returns a ticket; must not wait for the device."""
        raise NotImplementedError

    def linger(self) -> None:
        """Asked before a plan that will wait behind steps in flight: returns when the device is about to run
        out of work, so that what arrives meanwhile can be in the plan. An executor that cannot tell returns
        at once."""

    def collect(self, ticket: Any) -> StepResult:
        """Waits for that step. Tickets are collected in the order of launch."""
        raise NotImplementedError

    def read_blocks(self, blocks: Sequence[int]) -> Any:
        """What these KV blocks hold when every step launched so far is done, for `write_blocks` of another
        executor of the same model."""
        raise ConfigError(f"{self.plugin_name} cannot hand KV to another engine")

    def write_blocks(self, blocks: Sequence[int], content: Any, first: int) -> None:
        """Fills these KV blocks, before the next step, with what `content` holds from its block number
        `first` on."""
        raise ConfigError(f"{self.plugin_name} cannot take KV from another engine")

    def close(self) -> None:
        """Gives memory and other processes back. Called once, however the run ended."""
