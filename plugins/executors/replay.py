"""Repeating a recorded run: its tokens, its step times, and what its clock said.

A record is one `replay.npz`:
    readings  float64 [n]      what the run's clock answered, once a turn of the loop and once a completed step, in order; seconds
    step      int64 [steps]    number of the step; those that only preempted or rejected ran nothing and are left out
    start     float64 [steps]  the executor began the step; seconds
    end       float64 [steps]  its tokens were on the host; seconds
    tokens    int64 [total]    every request's generated tokens, request after request in order of arrival
    offsets   int64 [requests + 1]  request i's tokens are tokens[offsets[i] : offsets[i + 1]]
    ids       str [requests]   request ids, in order of arrival
    meta      str []           JSON: format, decision_hash, status, limits of the engine, and what the executor's caps said
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from headway import (
    ConfigError,
    Engine,
    Executor,
    ExecutorCaps,
    Hardware,
    HeadwayError,
    ModelShape,
    Observer,
    ReplayClock,
    StepPlan,
    StepRecord,
    StepResult,
    VirtualClock,
    hookimpl,
)

from .cost import Roofline

FORMAT = 1
FILE = "replay.npz"


class ReplayError(HeadwayError):
    """The run went another way than the record, or the record cannot be read."""


class RecordedClock(ReplayClock):
    """The record's readings. A run that needs more of them has left the record, and would else wait for ever."""

    def now(self) -> float:
        if self._next == len(self._readings) + 1:  # the one past the end dates the result
            self._next += 1
            raise ReplayError(f"the record's clock ends at {self._readings[-1]:.6f} s and this run goes on: it differs from the record's")
        return super().now()


@dataclass(frozen=True)
class Record:
    """A recorded run, read into memory."""

    path: Path
    readings: list[float]
    steps: dict[int, tuple[float, float]]  # number of the step -> its start and end, seconds
    tokens: dict[str, list[int]]  # request id -> generated tokens
    meta: dict[str, Any]

    @property
    def durations(self) -> list[float]:
        """Seconds of each step that ran, in order."""
        return [end - start for start, end in self.steps.values()]

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """`path` is a record or the run directory that holds one."""
        import numpy as np

        file = Path(path)
        file = file / FILE if file.is_dir() else file
        if not str(path) or not file.is_file():
            raise ReplayError(f"executor.path={str(path)!r}: expected a run directory with {FILE}, or such a file")
        try:
            with np.load(file, allow_pickle=False) as data:
                meta = json.loads(str(data["meta"]))
                offsets, tokens = data["offsets"].tolist(), data["tokens"].tolist()
                steps = dict(zip(data["step"].tolist(), zip(data["start"].tolist(), data["end"].tolist(), strict=True), strict=True))
                ids, readings = data["ids"].tolist(), data["readings"].tolist()
        except (OSError, ValueError, KeyError) as error:
            raise ReplayError(f"{file}: is no record of a run ({error}): record the run again") from error
        if meta.get("format") != FORMAT:
            raise ReplayError(f"{file}: format {meta.get('format')}, expected {FORMAT}: record the run again with this version")
        by_id = {id: tokens[a:b] for id, a, b in zip(ids, offsets, offsets[1:], strict=False)}
        return cls(file, readings, steps, by_id, meta)


def record(engine: Engine, steps: Sequence[tuple[int, float, float]], path: str | Path, status: str = "finished") -> Path:
    """Writes the record of a run that has ended. `steps` holds (number, start, end) of every completed step, in order; seconds."""
    import numpy as np

    file = Path(path)
    file = file / FILE if file.is_dir() else file
    outputs = sorted(engine.finished, key=lambda o: o.index)
    caps, config, cost = engine.executor.caps, engine.config, engine.cost_model
    meta = {
        "format": FORMAT,
        "status": status,
        "decision_hash": engine.decisions.hexdigest,
        "seed": engine.seed,
        "limits": {
            "num_blocks": engine.pool.num_blocks,
            "block_size": engine.pool.block_size,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
        },
        "max_inflight": config.max_inflight,
        "caps": {
            "max_model_len": caps.max_model_len,
            "vocab_size": caps.vocab_size,
            "eos_token_ids": sorted(caps.eos_token_ids),
            "placeholders": caps.placeholders,
            "max_inflight": caps.max_inflight,
        },
        "model": asdict(caps.model) if is_dataclass(caps.model) else None,
        "roofline": {"hardware": asdict(cost.hardware), "tp": cost.tp, "pp": cost.pp} if isinstance(cost, Roofline) else None,
    }
    offsets = np.cumsum([0, *(len(o.output_token_ids) for o in outputs)], dtype=np.int64)
    np.savez_compressed(
        file,
        readings=np.array(engine.clock.readings, np.float64),
        step=np.array([n for n, _, _ in steps], np.int64),
        start=np.array([s for _, s, _ in steps], np.float64),
        end=np.array([e for _, _, e in steps], np.float64),
        tokens=np.fromiter((t for o in outputs for t in o.output_token_ids), np.int64, int(offsets[-1])),
        offsets=offsets,
        ids=np.array([o.id for o in outputs], dtype=np.str_) if outputs else np.zeros(0, "U1"),
        meta=np.array(json.dumps(meta)),
    )
    return file


class Recorder(Observer):
    """Writes `replay.npz` when the run ends."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_start(self, run: Engine) -> None:
        self._engine = run
        self._steps: list[tuple[int, float, float]] = []

    def on_step(self, step: StepRecord) -> None:
        self._steps.append((step.step, step.start, step.end))

    def close(self, result: Any) -> None:
        record(self._engine, self._steps, self.path, getattr(result, "status", "finished"))


@dataclass
class Replay(Executor):
    """A recorded run again: its tokens and its clock, so that the same policies must take the same decisions."""

    path: str = ""  # run directory, or its replay.npz
    inner: str = ""  # "": tokens come from the record; or an executor's name: it runs, in the record's step times (see `over`)

    def prepare(self) -> None:
        """Before the engine is built. Raises ReplayError for a record that cannot be read."""
        self.record = Record.load(self.path)
        meta = self.record.meta
        shape = ModelShape(**meta["model"]) if meta["model"] else None
        self.caps = ExecutorCaps(**{**meta["caps"], "eos_token_ids": frozenset(meta["caps"]["eos_token_ids"]), "model": shape})
        if shape and (roofline := meta["roofline"]):
            self.cost_model = Roofline(shape, Hardware(**roofline["hardware"]), roofline["tp"], roofline["pp"])
        self.clock = RecordedClock(self.record.readings or [0.0])

    def over(self, inner: Executor) -> RecordedTimes:
        """`inner`, which is prepared, in the step times of this record."""
        return RecordedTimes(inner, Record.load(self.path).durations)

    def kv_capacity(self, block_size: int) -> int:
        return self.record.meta["limits"]["num_blocks"]

    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int) -> None:
        given = {"num_blocks": num_blocks, "block_size": block_size, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        for name, recorded in self.record.meta["limits"].items():
            if given[name] != recorded:
                raise ConfigError(f"engine.{name}={given[name]}, but {self.record.path} was recorded with {recorded}: set engine.{name}={recorded}")

    def launch(self, plan: StepPlan) -> StepPlan:
        if plan.step not in self.record.steps:
            raise ReplayError(
                f"step {plan.step} is not among the {len(self.record.steps)} steps of {self.record.path} (its run {self.record.meta['status']}). "
                "Replay with the policies, limits, seed and workload of the record; for others set executor.inner=sim"
            )
        return plan

    def collect(self, ticket: StepPlan) -> StepResult:
        plan = ticket
        tokens = []
        for request, start, length, sample in plan.chunks:
            if not sample:
                tokens.append(-1)
                continue
            known = self.record.tokens.get(request.id)
            if known is None:
                raise ReplayError(f"step {plan.step}: request {request.id} is not in {self.record.path}: replay the record's own workload and seed")
            position = start + length - request.num_prompt_tokens
            # Past the recorded end lies only a token that a step in flight sampled for a request that had ended by then.
            tokens.append(known[position] if 0 <= position < len(known) else 0)
        return StepResult(tokens, *self.record.steps[plan.step])


class RecordedTimes(Executor):
    """Another executor in virtual time: its tokens, but its k-th step takes as long as the k-th of a record.

    Two executors under the same step times must give the same decision log. A run longer than the record begins it again.
    """

    def __init__(self, inner: Executor, durations: Sequence[float]) -> None:
        if not durations:
            raise ReplayError("the record holds no step, so no step times can be taken from it")
        self.inner, self.durations = inner, durations
        self.caps, self.cost_model = inner.caps, inner.cost_model
        self.tokenizer, self.stop_text = getattr(inner, "tokenizer", None), getattr(inner, "stop_text", None)
        self.clock = VirtualClock()
        self._busy_until = 0.0
        self._launched = 0

    def kv_capacity(self, block_size: int) -> int:
        return self.inner.kv_capacity(block_size)

    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, seed: int) -> None:
        self.inner.start(num_blocks, block_size, max_num_seqs, max_num_batched_tokens, seed)

    def launch(self, plan: StepPlan) -> Any:
        begin = max(self.clock.now(), self._busy_until)
        self._busy_until = begin + self.durations[self._launched % len(self.durations)]
        self._launched += 1
        return self.inner.launch(plan), begin, self._busy_until

    def collect(self, ticket: Any) -> StepResult:
        inner, begin, end = ticket
        result = self.inner.collect(inner)
        return StepResult(result.tokens, begin, end, result.logprobs, result.timings)

    def close(self) -> None:
        self.inner.close()


@hookimpl
def headway_observers(run):
    return [Recorder(run.directory / FILE)] if run.directory else []


@hookimpl
def headway_register(registry):
    registry.add("executor", "replay", Replay)
