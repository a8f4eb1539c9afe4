"""What TorchExecutor does once torch is imported: builds and loads the model, sizes the KV cache, launches
and collects steps."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from headway import (
    ConfigError,
    EngineConfig,
    ModelConfig,
    ModelShape,
    StepPlan,
    StepResult,
    Tokens,
    check_fits,
)

from ...kernels.compose import KernelChoice, Kernels, compose, lookup
from ...kernels.torch import TorchKernels
from ...models.loading import Share, Whole, build, load
from ...models.spec import read_model
from .batch import NO_LOGPROBS, Batcher, StepInput
from .forecast import Flight, Forecast, kind_of
from .graphs import DecodeGraphs, MixedGraphs, batch_sizes, longest_mixed, token_sizes
from .memory import allocate_cache, bytes_per_token, host_cache, kv_bytes_free
from .runner import ModelRunner, Sampled
from .threads import limit_threads
from .warmup import PREPARATIONS, warm_up

if TYPE_CHECKING:
    from .config import TorchConfig


NO_MEMORY = "no memory is left to capture CUDA graphs"
MEMORY_REMEDY = (
    "lower executor.gpu_memory_utilization or engine.max_num_seqs, or set kernels.cuda_graphs=false"
)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one sampled token, of the model's own distribution."""

    token: int
    logprob: float
    rank: int  # of the sampled token, from 1
    best: dict[int, float]  # as many as the request asked for, best first


@dataclass(slots=True)
class Ticket:
    """A launched step. Times on the run's clock; seconds in `timings`."""

    step: StepInput
    plan: StepPlan
    launched: float
    slot: int  # of the result ring
    logprobs: tuple[Any, ...] | None = None  # as in Sampled, on the host
    # alternatives each sampled request asked for; filled when any does
    wanted: list[int | None] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    flight: Flight = field(init=False)  # once it is launched
    began: Any = None  # CUDA events around the step's work, when profiling
    ended: Any = None


class Execution:
    """On one rank. A parallel run overrides the hooks: which part of the weights is ours, what runs a step,
    how to wait for it."""

    batcher_class = Batcher
    runner_class = ModelRunner

    def __init__(
        self,
        config: TorchConfig,
        model: ModelConfig,
        kernels: KernelChoice | None,
        engine: EngineConfig,
        backends: Callable[[str], KernelChoice] | None,
        seed: int,
    ) -> None:
        self.config, self.engine = config, engine
        self.profile = config.profile  # may change between two runs
        limit_threads()
        self.device = device_of(config.device)
        self.spec = read_model(model)
        shape = self.spec.shape
        check_weights(self.device, model, shape)
        self.kernels = kernels_for(
            self.device.type, shape, kernels, backends=backends, block_size=engine.block_size
        )
        if self.device.type == "cuda":
            self._say(f"kernels: {self.kernels}")
        self.model = build(self.spec, self.kernels)
        load(self.model, self.device, self._share(), seed=seed)
        self.runner: ModelRunner
        self.warmup_seconds = 0.0
        self._prepared = PREPARATIONS.count
        self._last_end: Any = None  # CUDA event at the end of the last step, when profiling
        self._collected = 0.0
        self._forecast = Forecast()

    def _say(self, what: str) -> None:
        """To whoever started the run."""
        print(what, file=sys.stderr)

    def _share(self) -> Share:
        """Our part of the weights; may make the model smaller."""
        return Whole()

    # ---- memory -------------------------------------------------------------------------------------------

    def kv_capacity(self, block_size: int) -> int:
        """Blocks that fit beside the weights and what a step needs; one more is reserved for padding."""
        if (asked := self.config.kv_cache_gb) is not None:
            free = int(asked * 2**30)
            if self.device.type == "cpu":
                check_fits(free, f"executor.kv_cache_gb={asked}: a KV cache of that size", "lower it")
        elif self.device.type == "cuda":
            free = kv_bytes_free(
                self.model,
                self.kernels,
                self.device,
                self.engine,
                utilization=self.config.gpu_memory_utilization,
            )
        else:
            free = 2**30
        blocks = max(0, free // (bytes_per_token(self.model) * block_size) - 1)
        if asked is not None and not blocks:
            raise ConfigError(
                f"executor.kv_cache_gb={asked}: holds no KV block of {block_size} tokens; raise it"
            )
        if self.device.type == "cuda":
            self._say(
                f"KV cache: {blocks:,} blocks of {block_size} tokens, {free / 2**30:.2f} GiB of {self.device}"
            )
        return blocks

    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_plans: int,
        seed: int,
    ) -> None:
        check_fits(
            4 * (max_num_seqs + 1) * -(-max_model_len // block_size),
            f"engine.max_num_seqs={max_num_seqs}: block tables of {max_model_len} tokens each",
            "lower engine.max_num_seqs or engine.max_model_len",
        )
        caches = allocate_cache(self.model, num_blocks + 1, block_size, self.device)
        host_caches = host_cache(self.model, self.config.host_blocks, block_size, self.device)
        self.batcher = self.batcher_class(max_num_seqs, -(-max_model_len // block_size), seed)
        self.runner = self.runner_class(
            self.model,
            self.kernels,
            self.device,
            caches,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_plans=max_plans,
            host_caches=host_caches,
        )
        pinned = self.device.type == "cuda"
        # One result buffer for each step in flight: it is read before the engine launches the step that
        # reuses it.
        self._results = [
            torch.empty(max_num_seqs, dtype=torch.int64, pin_memory=pinned) for _ in range(max_plans + 1)
        ]
        self._read = [buffer.numpy() for buffer in self._results]
        self._arrived = [torch.cuda.Event() for _ in self._results] if pinned else []
        self._stream = torch.cuda.current_stream(self.device) if pinned else None
        self._slots = deque(range(len(self._results)))
        self._prepare_steps()

    def _prepare_steps(self) -> None:
        """Whatever a step may launch is compiled and captured here; graphs of before are given up first."""
        runner, began = self.runner, perf_counter()
        runner.decode_step, runner.mixed_graphs = runner.decode, None
        if self.device.type == "cuda":
            PREPARATIONS.listen()
            longest = (
                self._longest_mixed(runner.max_num_batched_tokens) if self.kernels.caps.mixed_graphs else 0
            )
            covered = f"prompts of up to {longest:,} tokens and decodes" if longest else "decodes"
            done = f"CUDA graphs of {covered}" if self._capture(longest) else "no CUDA graphs"
            if longest:  # else prompts are read on the host row by row
                sizes = token_sizes(runner.max_num_batched_tokens)
                captured = runner.mixed_graphs is not None
                warm_up(
                    runner,
                    [] if captured else batch_sizes(runner.max_num_seqs),
                    sizes[-1:] if captured else sizes,
                )
            self.warmup_seconds = perf_counter() - began
            self._say(f"warm-up: {self.warmup_seconds:.1f} s, {done}")
        self._prepared = PREPARATIONS.count

    @property
    def late_preparations(self) -> int:
        """Kernels compiled and graphs captured in this process since the warm-up: time that was charged to
        requests."""
        return PREPARATIONS.count - self._prepared

    def _capture(self, longest: int) -> bool:
        """Steps as CUDA graphs, those with prompts up to `longest` tokens. False where they are not asked for
        or find no memory."""
        runner = self.runner
        if not self.kernels.cuda_graphs:
            return False
        try:
            decode = DecodeGraphs(runner)
            mixed = MixedGraphs(runner, longest) if longest else None
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            self._go_without_graphs()
            return False
        runner.decode_step, runner.mixed_graphs = decode.decode, mixed
        return True

    def _go_without_graphs(self) -> None:
        """There was no memory to capture them."""
        self._say(f"warning: {NO_MEMORY}, so steps run without them: {MEMORY_REMEDY}")

    def _longest_mixed(self, at_most: int) -> int:
        """Tokens of the largest step with prompts that gets a graph: the same on every rank, or some would
        wait for others."""
        layer = next(iter(self.model.model.layers))
        return longest_mixed(sum(p.numel() for p in layer.parameters()), at_most)

    def close(self) -> None:
        """Gives the memory back."""
        for name in ("runner", "model"):
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            gc.collect()  # runner and graphs know each other
            torch.cuda.empty_cache()

    # ---- steps --------------------------------------------------------------------------------------------

    def launch(self, plan: StepPlan, now: float) -> Ticket:
        began = perf_counter()
        step = self.batcher.pack(plan)
        packed = perf_counter()
        slot = self._slots[0]
        self._slots.rotate(-1)
        ticket = Ticket(step, plan, now, slot)
        if step.logprobs != NO_LOGPROBS:
            ticket.wanted = [
                r.sampling.logprobs for r, sample in zip(plan.requests, plan.samples, strict=True) if sample
            ]
        if self.profile:
            ticket.began = self._mark()
        launching = perf_counter()
        self._send_back(ticket, self._execute(step))
        launched = perf_counter()
        ticket.flight = self._forecast.launched(kind_of(step.decode, step.num_tokens), began, launched)
        if self.profile:
            ticket.ended = self._mark()
            measuring = perf_counter() - launched + launching - packed
            ticket.timings = {"prepare": packed - began, "launch": launched - launching, "profile": measuring}
        return ticket

    def linger(self) -> None:
        """Until the next step has to be planned if the device is not to wait for it; on a CPU, which computes
        a step while it is launched, that is at once."""
        if self._arrived:
            sleep(max(0.0, self._forecast.next_plan() - perf_counter()))
            self._forecast.turn_begins(perf_counter())

    @torch.inference_mode()
    def read_blocks(self, blocks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [blocks, block_size, K, D], on the host."""
        chosen = torch.tensor(blocks, device=self.device)
        return [(keys[chosen].cpu(), values[chosen].cpu()) for keys, values in self.runner.caches]

    @torch.inference_mode()
    def write_blocks(self, blocks: Sequence[int], content: list[tuple[Tensor, Tensor]], first: int) -> None:
        chosen = torch.tensor(blocks, device=self.device)
        for own, arrived in zip(self.runner.caches, content, strict=True):
            for ours, theirs in zip(own, arrived, strict=True):
                ours[chosen] = theirs[first : first + len(blocks)].to(self.device)

    def _execute(self, step: StepInput) -> Sampled:
        return self.runner.execute(step)

    def _send_back(self, ticket: Ticket, sampled: Sampled) -> None:
        self._results[ticket.slot][: ticket.step.num_samples].copy_(sampled.tokens, non_blocking=True)
        if sampled.logprobs is not None:
            ticket.logprobs = tuple(part.to("cpu", non_blocking=True) for part in sampled.logprobs)
        if self._arrived:
            self._arrived[ticket.slot].record(self._stream)

    def collect(self, ticket: Ticket, clock: Any) -> StepResult:
        began = perf_counter()
        self._wait(ticket)
        waited = perf_counter()
        self._forecast.collected(ticket.flight, waited)
        step = ticket.step
        drawn = self._read[ticket.slot][: step.num_samples].tolist()
        logprobs = None if ticket.logprobs is None else _logprobs(drawn, ticket)
        end = clock.now()
        start, self._collected = max(ticket.launched, self._collected), end
        if ticket.timings:
            collected = perf_counter()
            ticket.timings |= {"wait": waited - began, "collect": collected - waited}
            if ticket.ended is not None:
                self._gpu_times(ticket)
            ticket.timings["profile"] += perf_counter() - collected
        if step.sampled is None:
            return StepResult(Tokens(drawn), start, end, logprobs, timings=ticket.timings)
        tokens = [-1] * step.num_seqs
        spread: list[Any] | None = None if logprobs is None else [[]] * step.num_seqs
        for i, at in enumerate(step.sampled):
            tokens[at] = drawn[i]
            if spread is not None and logprobs is not None:
                spread[at] = logprobs[i]
        return StepResult(Tokens(tokens), start, end, spread, timings=ticket.timings)

    def _wait(self, ticket: Ticket) -> None:
        """Until the step's tokens are in its result buffer."""
        if self._arrived:
            self._arrived[ticket.slot].synchronize()

    def _mark(self) -> torch.cuda.Event | None:
        """A point in time on the device; None on a CPU."""
        if not self._arrived:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _gpu_times(self, ticket: Ticket) -> None:
        ticket.ended.synchronize()
        ticket.timings["gpu"] = ticket.began.elapsed_time(ticket.ended) / 1e3
        if self._last_end is not None:
            ticket.timings["gpu_idle"] = max(0.0, self._last_end.elapsed_time(ticket.began) / 1e3)
        self._last_end = ticket.ended


def _logprobs(tokens: list[int], ticket: Ticket) -> list[list[TokenLogprobs | None]]:
    """A list of one for each sampled token; None for requests that asked for none."""
    own, rank, best, ids = (part.tolist() for part in ticket.logprobs or ())
    return [
        [
            None
            if wanted is None
            else TokenLogprobs(token, p, r, dict(zip(i[:wanted], b[:wanted], strict=True)))
        ]
        for token, p, r, b, i, wanted in zip(tokens, own, rank, best, ids, ticket.wanted, strict=True)
    ]


def check_weights(device: torch.device, model: ModelConfig, shape: ModelShape) -> None:
    """Raises ConfigError for weights that cannot fit into this machine; a GPU's memory is asked when they are
    loaded."""
    if device.type == "cpu":
        weights = (
            f"model.name_or_path={model.name_or_path}: {shape.num_parameters:,} weights in {shape.dtype}"
        )
        check_fits(shape.weight_bytes, weights, "choose a smaller model, or model.dtype=bfloat16")


def kernels_for(
    device: str,
    shape: ModelShape,
    kernels: KernelChoice | None,
    *,
    backends: Callable[[str], KernelChoice] | None,
    block_size: int,
) -> Kernels:
    """The composed kernels of a model on a kind of device. Raises ConfigError for what cannot run there."""
    backends = backends or lookup({"torch": TorchKernels})
    composed = compose(kernels or TorchKernels(), backends, device, shape.dtype, shape.head_dim, block_size)
    if composed.cuda_graphs and device != "cuda":
        raise ConfigError(
            f"kernels.cuda_graphs=true needs a GPU, the model runs on {device}: set kernels.cuda_graphs=false"
        )
    return composed


def device_of(name: str) -> torch.device:
    """What `executor.device` names. Raises ConfigError where torch does not see it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"executor.device={name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"executor.device={name}: torch sees {torch.cuda.device_count()} GPUs here. Set "
            "executor.device=cpu, or executor=sim"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
