"""The real engine: a model in torch on a CPU or a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headway import (
    BuildContext,
    ConfigError,
    Context,
    EngineConfig,
    Executor,
    ExecutorCaps,
    Hardware,
    ModelConfig,
    ModelShape,
    ParallelConfig,
    Preparation,
    Registry,
    Request,
    StepPlan,
    StepResult,
    TextStop,
    WallClock,
    hookimpl,
    param,
)

from ..cost import Fitted, Roofline, default_token_budget
from .config import TorchConfig
from .packages import check_installed
from .threads import wait_asleep

if TYPE_CHECKING:
    from ...kernels.compose import KernelChoice
    from ...models.tokenizer import Tokenizer
    from .execution import Execution

wait_asleep()  # before anything imports torch

MAX_PLANS = 4  # steps that may be in flight


@dataclass
class TorchExecutor(Executor):
    """The real engine: Hugging Face checkpoints in torch, on a CPU or a GPU.

    device: cpu, cuda, cuda:N, or auto (a GPU where there is one).
    gpu_memory_utilization: share of the GPU's memory for weights, activations and KV cache together.
    kv_cache_gb: GiB of KV cache; None is what a profiling pass leaves free on a GPU, 1 on a CPU.
    host_blocks: KV blocks in host memory, the tier behind the pool (KVCopy).
    profile: each step reports where its time went.

    `build`, or `prepare` where a run is composed by hand, reads the model's config, loads the weights and
    sets `caps`. `clock` may be replaced before that as well, for a replay.
    """

    device: str = "auto"
    gpu_memory_utilization: float = param(0.9, above=0, max=1)
    kv_cache_gb: float | None = param(None, above=0, max=16384, unit="GiB")
    profile: bool = False
    host_blocks: int = param(0, min=0, max=2**31 - 1)

    def __post_init__(self) -> None:
        self.clock = WallClock()
        self.cost_model: Fitted | None = None
        self.tokenizer: Tokenizer | None = None  # None for random weights without a checkpoint
        self._execution: Execution | None = None
        self._max_model_len: int | None = None

    several_ranks = torchrun = True

    def build(self, context: BuildContext) -> TorchExecutor:
        self.prepare(
            context.model,
            context.kernels,
            engine=context.engine,
            backends=context.kernels_named,
            seed=context.seed,
            parallel=context.parallel,
            hardware=context.hardware,
        )
        return self

    def prepare(
        self,
        model: ModelConfig,
        kernels: KernelChoice | None = None,
        *,
        engine: EngineConfig | None = None,
        backends: Callable[[str], KernelChoice] | None = None,
        seed: int = 0,
        parallel: ParallelConfig | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        """Loads the model; `caps` and `kv_capacity` are known afterwards.

        kernels: the `kernels` role (None: plain torch). backends: name -> kernels role with its defaults, for
        a composition of several. engine: its limits size the profiling pass. parallel: starts the other
        ranks, or turns this process into one of them. hardware: the card of the GPU (None: that of an H200),
        from which the default token budget is derived, and the times of steps that policies ask for, until
        there are measured ones; on a CPU the latter alone. Raises ConfigError and ModelError before weights
        are read, and RankError when another rank fails.
        """
        check_installed()
        parallel, card = parallel or ParallelConfig(), hardware or Hardware()
        self._before_weights(model, engine or EngineConfig(), parallel)
        if parallel.world_size > 1:
            from ...parallel.config import MeshConfig
            from ...parallel.execution import Job, drive

            mesh = MeshConfig.of(parallel)
            job = Job(self.config, model, kernels, engine or EngineConfig(), seed, mesh)
            self._execution = drive(job, backends)
        else:
            from .execution import Execution

            self._execution = Execution(
                self.config, model, kernels, engine or EngineConfig(), backends=backends, seed=seed
            )
        spec, on_gpu = self._execution.spec, self._execution.device.type == "cuda"
        self._foretell(spec.shape, card, parallel)
        self.caps = _caps(
            spec.shape, spec.eos_token_ids, parallel, card if on_gpu else None, host_blocks=self.host_blocks
        )

    def check(self, context: BuildContext) -> ExecutorCaps | None:
        """Raises ConfigError and ModelError for what can be known without weights, ranks or a download."""
        check_installed()
        from .foresight import foresee

        parallel = context.parallel
        shape = foresee(
            self.config,
            context.model,
            context.kernels,
            engine=context.engine,
            backends=context.kernels_named,
            parallel=parallel,
        )
        if shape is None:
            return None
        self._foretell(shape, context.hardware, parallel)
        # until `build` has read the checkpoint
        self.caps = _caps(shape, frozenset(), parallel, None, host_blocks=self.host_blocks)
        return self.caps

    @property
    def config(self) -> TorchConfig:
        """The parameters, as every rank is given them."""
        return TorchConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TorchConfig)})

    def _foretell(self, shape: ModelShape, hardware: Hardware, parallel: ParallelConfig) -> None:
        """Policies may ask how long a step will take."""
        self.cost_model = Fitted(Roofline(shape, hardware, parallel.tp, parallel.pp))

    def _before_weights(self, model: ModelConfig, engine: EngineConfig, parallel: ParallelConfig) -> None:
        """Reads the tokenizer and sizes the KV cache: both may be wrong, and weights take minutes."""
        from ...models.files import is_there
        from ...models.spec import read_model
        from ...models.tokenizer import Tokenizer
        from .execution import device_of
        from .memory import check_blocks

        spec = read_model(model)
        check_blocks(engine, spec.shape, parallel, device_of(self.device))
        if spec.directory is not None and is_there(spec.directory / "tokenizer.json"):
            self.tokenizer = Tokenizer(spec.directory, spec.shape.max_position_embeddings)

    @property
    def step_time_basis(self) -> str:
        return "" if self.cost_model is None else str(self.cost_model)

    @property
    def execution(self) -> Execution:
        if self._execution is None:
            raise ConfigError(
                "executor=torch has no model: call prepare(model, kernels) before the engine is built"
            )
        return self._execution

    @property
    def stop_text(self) -> Callable[[Request], TextStop | None] | None:
        """What the engine asks about stop strings; None without a tokenizer."""
        from ...models.tokenizer import stop_text

        return stop_text(self.tokenizer) if self.tokenizer is not None else None

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._max_model_len = ctx.max_model_len

    def kv_capacity(self, block_size: int) -> int:
        return self.execution.kv_capacity(block_size)

    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int
    ) -> None:
        longest = self._max_model_len or self.caps.max_model_len
        self.execution.start(
            num_blocks,
            block_size,
            max_num_seqs,
            max_num_batched_tokens,
            longest,
            self.caps.max_inflight,
            seed,
        )

    def launch(self, plan: StepPlan) -> Any:
        return self.execution.launch(plan, self.clock.now())

    def read_blocks(self, blocks: Sequence[int]) -> list[Any]:
        return self.execution.read_blocks(blocks)

    def write_blocks(self, blocks: Sequence[int], content: list[Any], first: int) -> None:
        self.execution.write_blocks(blocks, content, first)

    def linger(self) -> None:
        self.execution.linger()

    def collect(self, ticket: Any) -> StepResult:
        result = self.execution.collect(ticket, self.clock)
        assert self.cost_model is not None  # since `prepare`
        self.cost_model.observe(ticket.plan.starts, ticket.plan.lengths, result.end - result.start)
        return result

    @property
    def preparation(self) -> Preparation:
        return Preparation(self.execution.warmup_seconds, self.execution.late_preparations)

    def close(self) -> None:
        if self._execution is not None:
            self._execution.close()


def _caps(
    shape: ModelShape,
    eos_token_ids: frozenset[int],
    parallel: ParallelConfig,
    card: Hardware | None,
    *,
    host_blocks: int,
) -> ExecutorCaps:
    """card: of the GPU; None on a CPU, which has no time to hide behind a device's and is best at short
    steps."""
    default = {} if card is None else {"default_token_budget": default_token_budget(shape, card, parallel.tp)}
    pp = parallel.pp
    # A token that a later stage still samples is unknown to the first, so a pipeline cannot plan it.
    return ExecutorCaps(
        shape.max_position_embeddings,
        shape.vocab_size,
        eos_token_ids,
        placeholders=pp == 1,
        max_inflight=max(MAX_PLANS, 2 * pp),
        model=shape,
        default_inflight=max(pp, 1 if card is None else 2),
        tier_blocks=(host_blocks,) if host_blocks else (),
        **default,
    )


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("executor", "torch", TorchExecutor)
