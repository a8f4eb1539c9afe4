"""Repeating a recorded run: its tokens, its step times, its clock. Whatever differs from the record is an
error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headway import (
    BuildContext,
    ConfigError,
    Executor,
    ExecutorCaps,
    ModelError,
    ModelShape,
    Observer,
    Preparation,
    Registry,
    ReplayClock,
    Request,
    RequestOutput,
    Run,
    RunResult,
    StepPlan,
    StepResult,
    StopText,
    TextStop,
    VirtualClock,
    VirtualServer,
    composition_facts,
    fact_differences,
    hookimpl,
)

from .cost import Fitted, restored
from .record import FILE, PlanDigest, Prompt, Record, Recorder, ReplayError, Said

__all__ = ["Record", "RecordedTimes", "Recorder", "Replay", "ReplayError"]

OWN_WORKLOAD = "replay the record's own workload and seed"
#: Facts that decide nothing: who runs the plans, who watches, and what is checked or waited for meanwhile.
NO_MATTER = ("executor", "tracking", "engine.check", "engine.native", "parallel.timeout", "parallel.port")


class RecordedClock(ReplayClock):
    """The record's readings. A run that needs more of them has left the record, and would else wait for
    ever."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.readings or [0.0])
        self._status = record.meta["status"]

    def now(self) -> float:
        if self._next == len(self._readings) + 1:  # the one past the end dates the result
            self._next += 1
            cause = f"the recorded run was {self._status} there"
            if self._status == "finished":
                cause = "it differs from the record's"
            end = self._readings[-1]
            raise ReplayError(f"the record's clock ends at {end:.6f} s and this run goes on: {cause}")
        return super().now()


class RecordedTexts:
    """Stands in for the tokenizer of the recorded run: knows the texts that were said in it, and no other."""

    has_chat_template = True

    def __init__(self, record: Record) -> None:
        self._path = record.path
        self._said = {said.prompt: said for said in record.said}
        self._answers = {said.id: said.answer for said in record.said}

    def encode(self, text: str) -> list[int]:
        if (said := self._said.get(text)) is None:
            raise ReplayError(f"the prompt {text[:60]!r} is not in {self._path}: {OWN_WORKLOAD}")
        if said.refusal:
            raise ModelError(said.refusal)
        return said.prompt_token_ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode(messages[-1]["content"])

    def answer(self, prompt_token_ids: Sequence[int], output: RequestOutput) -> str:
        return self._answers.get(output.id, "")


@dataclass
class Replay(Executor):
    """A recorded run again: its tokens and its clock. Whatever differs from the record, decisions among it,
    is an error."""

    path: str = ""  # run directory, or its replay.npz
    inner: str = ""  # "": tokens are the record's; or an executor: another run, in the record's step times

    several_ranks = torchrun = True  # nothing is split here, so any layout that was recorded will do

    def check(self, context: BuildContext) -> ExecutorCaps | None:
        """A record is read quickly, so a wrong one is refused before anything runs."""
        self.prepare(context.facts())
        if not self.inner:
            return self.caps
        inner = context.executor_named(self.inner)
        caps = inner.check(context)
        self.cost_model = inner.cost_model
        return caps

    def build(self, context: BuildContext) -> Executor:
        self.prepare(context.facts())
        if not self.inner:
            return self
        wrapped = RecordedTimes(
            context.executor_named(self.inner).build(context), self.record.durations, self.told
        )
        wrapped.plugin_name = f"{self.plugin_name}({self.inner})"
        return wrapped

    def prepare(self, facts: dict[str, Any] | None = None) -> None:
        """Before the engine is built. Raises ReplayError for what is no record, and for a composition that is
        not the record's.

        facts: the composition; None for an engine that was built by hand, which is compared by its limits,
        its seed and its decisions.
        """
        record = self.record = Record.load(self.path)
        self.told = self._compared(facts)
        meta, caps = record.meta, record.meta["caps"]
        try:
            shape = ModelShape(**meta["model"]) if meta["model"] else None
            eos = frozenset(caps["eos_token_ids"])
            given = {"eos_token_ids": eos, "model": shape, "tier_blocks": tuple(caps["tier_blocks"])}
            self.caps = ExecutorCaps(**{**caps, **given})
            if shape and (cost := meta["roofline"]):
                self.cost_model = restored(shape, cost)
        except (TypeError, KeyError, ValueError) as error:
            problem = f"is no record of this version ({error})"
            raise ReplayError(f"{record.path}: {problem}: record the run again") from error
        self.clock = RecordedClock(record)
        self._said = {said.id: said for said in record.said}
        self.tokenizer = RecordedTexts(record) if record.said else None

    def _compared(self, facts: dict[str, Any] | None) -> str:
        """What was found, for the reader of the run's output."""
        if facts is None:
            return ""
        record = self.record
        if (recorded := record.meta["facts"]) is None:
            raise ReplayError(f"{record.path}: does not hold its run's composition: record one with run.py")
        limits, derived = record.meta["limits"], record.meta["derived"]
        then, now = _that_matter(recorded, limits, derived), _that_matter(facts, limits, derived)
        differing = fact_differences(then, now)
        lines = "".join(f"\n  {line}" for line in differing)
        if self.inner:
            others = f" Differences:{lines}" if differing else ""
            return (
                f"executor={self.inner} in the step times of {record.path}: a run of its own, no "
                f"replay.{others}"
            )
        if differing:
            raise ReplayError(
                f"executor.path={self.path}: this run is not the recorded one:{lines}\n"
                f"Give executor=replay and its own overrides ({record.path.parent}/.hydra/overrides.yaml). "
                "For another run in the step times of this one, set executor.inner (executor.inner=sim)"
            )
        return f"replay of {record.path}: {len(then)} facts compared, all as recorded"

    @property
    def step_time_basis(self) -> str:
        return "" if self.cost_model is None else str(self.cost_model)

    def kv_capacity(self, block_size: int) -> int:
        count: int = self.record.meta["limits"]["num_blocks"]
        return count

    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int
    ) -> None:
        meta, path = self.record.meta, self.record.path
        given = {
            "engine.num_blocks": num_blocks,
            "engine.block_size": block_size,
            "engine.max_num_seqs": max_num_seqs,
            "engine.max_num_batched_tokens": max_num_batched_tokens,
            "seed": seed,
        }
        for name, value in given.items():
            recorded = meta["seed"] if name == "seed" else meta["limits"][name.removeprefix("engine.")]
            if value != recorded:
                then = f"{path} was recorded with {recorded}"
                raise ConfigError(f"{name}={value}, but {then}: set {name}={recorded}")

    def launch(self, plan: StepPlan) -> StepPlan:
        record = self.record
        for request in plan.admitted:
            self._check_request(plan.step, request)
        if plan.step not in record.steps:
            status = record.meta["status"]
            among = f"is not among the {len(record.steps)} steps of {record.path} (its run {status})"
            raise ReplayError(f"step {plan.step} {among}: {OWN_WORKLOAD}")
        if difference := PlanDigest.of(plan).differs(record.plan(plan.step)):
            found = f"{difference}. Planned here: {_shown(plan)}"
            raise ReplayError(f"step {plan.step} is not that of {record.path}: {found}")
        return plan

    def _check_request(self, step: int, request: Request) -> None:
        """The workload is the recorded one, as far as it has come."""
        record, id = self.record, request.id
        if id not in record.tokens:
            raise ReplayError(f"step {step}: request {id} is not in {record.path}: {OWN_WORKLOAD}")
        prompt, recorded = Prompt.of(request), record.prompts[id]
        if prompt != recorded:
            how = "as long, but other tokens"
            if prompt.length != recorded.length:
                how = f"{prompt.length} tokens, recorded with {recorded.length}"
            raise ReplayError(f"step {step}: the prompt of request {id} is not that of {record.path}: {how}")
        if request.arrival_time != record.arrivals[id]:
            times = f"{request.arrival_time:.6f} s, recorded at {record.arrivals[id]:.6f} s"
            raise ReplayError(f"step {step}: request {id} does not arrive as in {record.path}: at {times}")

    def collect(self, ticket: StepPlan) -> StepResult:
        plan = ticket
        tokens: list[list[int]] = []
        for place, (request, start, length, sample, drafts) in enumerate(plan.chunks):
            known = self.record.tokens[request.id]
            position = start + length - len(drafts) - request.num_prompt_tokens
            count = 1 + self.record.more.get((plan.step, place), 0)
            # Past the recorded end lies only a token that a step in flight sampled for a request that had
            # ended by then.
            tokens.append((known[position : position + count] or [0]) if sample else [])
        began, end = self.record.steps[plan.step]
        if isinstance(self.cost_model, Fitted):
            self.cost_model.observe(plan.starts, plan.lengths, end - began)
        return StepResult(tokens, began, end)

    @property
    def stop_text(self) -> StopText:
        return self._stop_text

    def _stop_text(self, request: Request) -> TextStop | None:
        """Whether a stop string ended this request here in the recorded run."""
        said: Said | None = self._said.get(request.id)
        if said is None or said.text is None:
            return None
        if request.num_output_tokens < len(self.record.tokens[request.id]):
            return None
        return TextStop(said.text, said.stop_reason)


def _shown(plan: StepPlan) -> str:
    chunks = [f"{c.request.id}[{c.start}:{c.start + c.length}]" for c in plan.chunks]
    return " ".join(chunks[:8]) + (" ..." if len(chunks) > 8 else "")


def _that_matter(facts: dict[str, Any], limits: dict[str, int], derived: dict[str, Any]) -> dict[str, Any]:
    """The facts that decide something. A limit of memory that is left open is the record's, whose executor
    answers here; what the recorded run derived (`derived`), this one derives from the same capabilities."""
    found = {name: value for name, value in facts.items() if not name.startswith(NO_MATTER)}
    left_open = {
        f"engine.{name}": recorded for name, recorded in limits.items() if name != "max_inflight"
    } | derived
    found |= {name: recorded for name, recorded in left_open.items() if name in found and found[name] is None}
    if (given := found["engine.max_inflight"]) is not None:
        found["engine.max_inflight"] = max(given, found.get("parallel.pp", 1))
    return found


class Verifier(Observer):
    """After the last step: the run had the record's requests and took all of its decisions."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay

    def close(self, result: RunResult) -> None:
        record = self.replay.record
        if result.status != "finished":  # an error or Ctrl-C: it has its own message
            return
        ids = {o.id for o in result.outputs}
        missing, new = sorted(record.tokens.keys() - ids), sorted(ids - record.tokens.keys())
        if missing or new:
            counts = f"{len(ids)} requests here, {len(record.tokens)} in {record.path}"
            raise ReplayError(f"{counts}; {(missing or new)[0]} is in one of them only: {OWN_WORKLOAD}")
        if result.decision_hash != (recorded := record.meta["decision_hash"]):
            hashes = f"decision hash {result.decision_hash}, recorded in {record.path} with {recorded}"
            raise ReplayError(f"{hashes}: evictions or refusals differ")


class RecordedTimes(Executor):
    """Another executor in virtual time: its tokens, but its k-th step takes as long as the k-th of a record.

    Two executors under the same step times must give the same decision log. A run longer than the record
    begins it again.
    """

    def __init__(self, inner: Executor, durations: Sequence[float], told: str = "") -> None:
        """told: how the run differs from the record, for its reader."""
        if not durations:
            raise ReplayError("the record holds no step, so no step times can be taken from it")
        self.inner, self.durations, self.told = inner, durations, told
        self.caps, self.cost_model = inner.caps, inner.cost_model
        self.tokenizer = inner.tokenizer
        self.clock = VirtualClock()
        self._server = VirtualServer(self.clock)
        self._launched = 0

    def kv_capacity(self, block_size: int) -> int:
        return self.inner.kv_capacity(block_size)

    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int
    ) -> None:
        self.inner.start(num_blocks, block_size, max_num_seqs, max_num_batched_tokens, seed)

    def launch(self, plan: StepPlan) -> Any:
        begin, end = self._server.serve(self.durations[self._launched % len(self.durations)])
        self._launched += 1
        return self.inner.launch(plan), begin, end

    def collect(self, ticket: Any) -> StepResult:
        inner, begin, end = ticket
        result = self.inner.collect(inner)
        return StepResult(result.tokens, begin, end, result.logprobs, timings=result.timings)

    @property
    def stop_text(self) -> StopText | None:
        return self.inner.stop_text

    def read_blocks(self, blocks: Sequence[int]) -> Any:
        return self.inner.read_blocks(blocks)

    def write_blocks(self, blocks: Sequence[int], content: Any, first: int) -> None:
        self.inner.write_blocks(blocks, content, first)

    @property
    def preparation(self) -> Preparation:
        return self.inner.preparation

    @property
    def step_time_basis(self) -> str:
        return self.inner.step_time_basis

    def close(self) -> None:
        self.inner.close()


@hookimpl
def headway_observers(run: Run) -> Sequence[Observer]:
    executor = run.roles["executor"]
    observers: list[Observer] = []
    if isinstance(executor, Replay):
        observers.append(Verifier(executor))
    if run.directory is None or not run.writes(FILE):
        return observers
    file = run.directory / FILE
    if isinstance(executor, Replay) and file.resolve() == executor.record.path.resolve():
        return observers  # a record is not written over by its own replay
    recorder = Recorder(file, composition_facts(run.registry, run.composition))
    run.step_log.readers.append(recorder.read)
    return [*observers, recorder]


@hookimpl
def headway_run_start(run: Run) -> None:
    executor = run.roles["executor"]
    if run.directory and isinstance(executor, (Replay, RecordedTimes)):
        print(executor.told, flush=True)


@hookimpl
def headway_run_end(run: Run, result: RunResult) -> None:
    if run.directory and isinstance(run.roles["executor"], Replay) and result.status == "finished":
        decided = f"{result.num_steps:,} steps, decision hash {result.decision_hash}"
        print(f"replayed: {decided}, as recorded", flush=True)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("executor", "replay", Replay)
