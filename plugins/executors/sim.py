"""The engine's loop in virtual time: no model, no device, step times from a cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from headway import (
    BuildContext,
    ConfigError,
    EngineConfig,
    Executor,
    ExecutorCaps,
    Hardware,
    ModelShape,
    Registry,
    Request,
    Run,
    StepPlan,
    StepResult,
    TimeModel,
    Tokens,
    VirtualClock,
    VirtualServer,
    hookimpl,
    param,
)

from .cost import Roofline, default_token_budget
from .likeness import Likeness
from .profile import Profile, matching, read
from .step_fit import profile_of_run, profile_of_served

PROFILES = Path(__file__).resolve().parents[2] / "conf" / "hardware" / "profiles"


@dataclass
class SimExecutor(Executor):
    """Discrete-event simulation: step times from a roofline of model, hardware and plan."""

    memory_utilization: float = param(
        0.9,
        above=0,
        max=1,
        doc="share of the device's memory that weights, activations and KV may take",
    )
    activation_gb: float = param(
        1.0,
        min=0,
        max=1e6,
        unit="GiB",
        doc="of each rank, set aside for activations",
    )
    charge_policy_time: float = param(
        0.0,
        min=0,
        max=1e6,
        unit="seconds",
        doc="of the host for each planned request, before the device can start",
    )
    max_plans: int = param(8, min=1, max=1024, doc="most plans in flight")
    profile: str = param(
        "auto",
        doc="measured step times: a file; the directory of a recorded run, or the file of `vllm bench serve "
        "--save-result --save-detailed`, to fit them to its steps; auto: the shipped one of this run, where "
        "there is one; none: the roofline",
    )
    like: str = param(
        "",
        doc="directory of a recorded run whose limits are taken: KV blocks, their size, budgets, plans in "
        "flight, context",
    )

    # what was taken from there, for the reader of the run's output
    told: str = field(default="", init=False, repr=False)

    def prepare(
        self,
        shape: ModelShape,
        hardware: Hardware,
        tp: int = 1,
        pp: int = 1,
        eos_token_ids: frozenset[int] = frozenset(),
        max_num_batched_tokens: int = EngineConfig().max_num_batched_tokens,
    ) -> None:
        """Before the engine is built: what runs, and on what. The clock starts at 0."""
        self.roofline = Roofline(shape, hardware, tp, pp)
        self.measured = self._profile(shape, hardware.name, tp, pp, max_num_batched_tokens)
        self.cost_model = self.measured or self.roofline
        self.caps = ExecutorCaps(
            shape.max_position_embeddings,
            shape.vocab_size,
            eos_token_ids,
            placeholders=pp == 1,
            max_inflight=max(self.max_plans, pp),
            model=shape,
            default_inflight=pp,
            default_token_budget=default_token_budget(shape, hardware, tp),
        )
        self.clock = VirtualClock()

    several_ranks = True

    def check(self, context: BuildContext) -> ExecutorCaps:
        """It loads nothing, so all of it can be known before a sweep begins."""
        return self.build(context).caps

    def build(self, context: BuildContext) -> SimExecutor:
        self.prepare(
            context.shape,
            context.hardware,
            context.parallel.tp,
            context.parallel.pp,
            max_num_batched_tokens=self.limits(context).max_num_batched_tokens,
        )
        if likeness := self._likeness:
            likeness.check(context)
            self.caps = likeness.caps(self.caps)
            self.told = likeness.told(context.facts())
        return self

    def limits(self, context: BuildContext) -> EngineConfig:
        return self._likeness.limits(context.engine) if self._likeness else context.engine

    @cached_property
    def _likeness(self) -> Likeness | None:
        """The run whose limits are taken, read once."""
        return Likeness.read(self.like) if self.like else None

    def _profile(
        self, shape: ModelShape, hardware: str, tp: int, pp: int, max_num_batched_tokens: int
    ) -> Profile | None:
        """Measured step times, where there are any; a pipeline's stages are not measured one by one."""
        if self.profile == "none" or (self.profile == "auto" and pp > 1):
            return None
        if self.profile == "auto":
            return matching(PROFILES, shape, hardware, tp, pp=pp)
        path = Path(self.profile).expanduser()
        if path.is_dir():
            found = profile_of_run(path)
        elif path.suffix == ".json":  # knows neither its model nor its card: they are taken to be this run's
            about = {"hardware": hardware, "shape": asdict(shape), "tp": tp, "pp": pp}
            found = profile_of_served(path, max_num_batched_tokens, **about)
        else:
            found = read(path)
        found.check(path, shape, hardware, tp, pp)
        if pp > 1:
            raise ConfigError(
                f"executor.profile={path}: parallel.pp={pp} has stages, which a profile knows nothing of; "
                "set executor.profile=none"
            )
        return found

    @property
    def step_time_basis(self) -> str:
        return str(self.cost_model)

    @property
    def time_model(self) -> TimeModel:
        used = self.measured or self.roofline
        return TimeModel(str(used), used.stated_error)

    def kv_capacity(self, block_size: int) -> int:
        return self.roofline.kv_capacity(block_size, self.memory_utilization, self.activation_gb)

    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int
    ) -> None:
        self._seed = seed
        # request index -> its token sequence, see stream
        self._streams: dict[int, tuple[int, int, int, int]] = {}
        self._host = VirtualServer(self.clock)
        self._stage_free = [0.0] * self.roofline.pp

    def launch(self, plan: StepPlan) -> Any:
        _, planned = self._host.serve(self.charge_policy_time * len(plan.requests))
        stage, send = self._stage_time(plan)
        # Stages work on different plans at once: a plan enters a stage when both are free.
        free = self._stage_free
        begin = now = max(planned, free[0])
        for i in range(len(free)):
            now = max(now, free[i]) + stage
            free[i] = now
            now += send
        return plan, begin, free[-1]

    def _stage_time(self, plan: StepPlan) -> tuple[float, float]:
        """Seconds of one stage, and of the send behind it."""
        if self.measured is not None:
            return self.measured.step_time(plan.starts, plan.lengths), 0.0
        stage, send = self.roofline.stage_time(plan.starts, plan.lengths)
        return stage + self.roofline.hardware.step_overhead / self.roofline.pp, send

    def collect(self, ticket: Any) -> StepResult:
        plan, begin, end = ticket
        streams = self._streams
        for request in plan.left:
            streams.pop(request.index, None)
        tokens = []
        for request, start, length, sample in zip(
            plan.requests, plan.starts, plan.lengths, plan.samples, strict=True
        ):
            if sample:
                low, size, base, stride = streams.get(request.index) or self._stream(request)
                tokens.append(low + (base + (start + length) * stride) % size)
            else:
                tokens.append(-1)
        return StepResult(Tokens(tokens), begin, end)

    def read_blocks(self, blocks: Sequence[int]) -> None:
        """Nothing is stored, so nothing has to go along."""

    def write_blocks(self, blocks: Sequence[int], content: None, first: int) -> None:
        pass

    def _stream(self, request: Request) -> tuple[int, int, int, int]:
        stream = self._streams[request.index] = self.stream(request)
        return stream

    def stream(self, request: Request) -> tuple[int, int, int, int]:
        """A request's tokens: (low, size, base, stride), token at position p = low + (base + p * stride) mod
        size.

        A function of seed, request id and position alone. Ids that would end the request are avoided: endings
        come from output_len and max_tokens, so the widest run of ids without them is used.
        """
        stops = sorted({*self.caps.eos_token_ids, *request.sampling.stop_token_ids})
        edges = [-1, *(t for t in stops if 0 <= t < self.caps.vocab_size), self.caps.vocab_size]
        size, low = max((b - a - 1, a + 1) for a, b in pairwise(edges))
        if size < 1:
            size, low = self.caps.vocab_size, 0  # every id ends the request
        key = f"{self._seed}/{request.id}".encode()
        return low, size, crc32(key), crc32(key, 1) | 1


@hookimpl
def headway_run_start(run: Run) -> None:
    executor = run.roles["executor"]
    if run.directory and isinstance(executor, SimExecutor) and executor.told:
        print(executor.told, flush=True)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("executor", "sim", SimExecutor)
