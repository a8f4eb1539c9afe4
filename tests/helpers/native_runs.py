"""Runs of small random cases, through the engine and through its compiled twin, and what must be the same of
both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from core.compose.build import Composition, Run, build
from core.compose.config import EngineConfig, Hardware, ModelConfig, ParallelConfig
from core.compose.defaults import default_choices
from core.compose.hooks import Registry, load_registry
from core.inputs import Arrival
from core.outputs import RunResult
from core.testing.case import CONTEXT, Case, random_case
from headway import Observer, StepColumns, Workload
from plugins.executors.profile import Profile, Terms, write

MEASURED = ("policy_time", "loop")  # of a result: what may differ
# As slow as the arrivals of a case are apart, so that queues form; four layers, so that pp can be 2.
SLOW = Hardware(
    "slow",
    memory_bandwidth=3e7,
    peak_flops=2e9,
    link_bandwidth=1e6,
    link_latency=1e-3,
    step_overhead=1e-3,
    layer_overhead=7e-5,
)
SHAPE = ModelConfig(
    name_or_path="shape of the tests", load_format="dummy", architecture="LlamaForCausalLM", hidden_size=64,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128,
    vocab_size=50, tie_word_embeddings=True, max_position_embeddings=CONTEXT,
)  # fmt: skip


@dataclass
class Given(Workload):
    """Arrivals that a test made, by name."""

    key: str = ""
    made: ClassVar[dict[str, Iterable[Any]]] = {}

    def arrivals(self, seed: int, vocab_size: int, max_model_len: int) -> Iterable[Any]:
        return self.made[self.key]


def registry() -> Registry:
    found = load_registry()
    found.add("workload", "given", Given)
    return found


@dataclass
class Seen:
    """All that a run leaves behind, but for what was measured."""

    result: dict[str, Any]
    readings: list[float]
    steps: list[dict[str, Any]] = field(default_factory=list)
    loop: str = ""
    error: str = ""

    def differences(self, other: Seen) -> list[str]:
        mine, theirs = self._parts(), other._parts()
        return [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]

    def _parts(self) -> dict[str, Any]:
        parts = {f"result.{name}": value for name, value in self.result.items() if name not in MEASURED}
        return parts | {"readings": self.readings, "steps": self.steps, "error": self.error}


def random_choices(rng: Random) -> dict[str, tuple[str, dict[str, Any]]]:
    """A composition that has a twin."""
    chunked = {"token_budget": rng.choice([None, 3, 8, 40]), "chunk_size": rng.choice([None, None, 2, 5])}
    chunked["admit_on"] = rng.choice(["prompt", "chunk"])
    whole = {"watermark": rng.choice([0.0, 0.0, 0.2])}
    choices = default_choices(
        scheduler=rng.choice([("chunked", chunked), ("prefill_first", whole), ("fcfs", whole)]),
        cache=rng.choice(["none", "hash", "hash"]),
        executor=("sim", {"charge_policy_time": rng.choice([0.0, 0.002])}),
        workload=("given", {"key": "now"}),
    )
    return choices | ({"admission": ("always", {})} if rng.random() < 0.2 else {})


def arrivals_of(case: Case, rng: Random) -> list[Arrival]:
    """The case's requests without their follow-ups; some end at a token of their own, and some cannot be
    read."""
    made = []
    for ask in case.asks:
        arrival = ask.arrival()
        if rng.random() < 0.05:
            arrival = dataclasses.replace(
                arrival, prompt_token_ids=rng.choice(["text", [1, 2.5], [True], [2**70], range(7)])
            )
        if rng.random() < 0.2:
            stops = tuple(range(50)) if rng.random() < 0.5 else (3, 4)
            arrival = dataclasses.replace(
                arrival, sampling=dataclasses.replace(arrival.sampling, stop_token_ids=stops)
            )
        made.append(arrival)
    return made


def composition(case: Case, rng: Random, native: str, folder: Path) -> Composition:
    limits = EngineConfig(
        case.block_size, case.num_blocks, case.max_num_seqs, case.max_num_batched_tokens, native=native
    )
    pp = 1 if case.placeholders else 2
    limits.max_inflight = max(case.max_inflight, pp)
    parallel = ParallelConfig(tp=rng.choice([1, 1, 2]), pp=pp)
    choices = random_choices(rng)
    if parallel.world_size == 1 and rng.random() < 0.5:
        choices["executor"][1]["profile"] = str(measured(rng, folder))
    return Composition(choices, limits, SHAPE, SLOW, parallel, seed=case.seed)


def measured(rng: Random, folder: Path) -> Path:
    """Step times of the tests' shape, made up."""
    path = folder / "profile.yaml"

    def terms() -> Terms:
        slopes = [rng.random() * 1e-3 for _ in range(3)]
        rest = [rng.random() * 1e-3 for _ in range(4)]
        return Terms(rng.random() * 1e-2, [0, 3, 9], slopes, *rest, sizes=rng.choice([[], [1, 2, 4, 8]]))

    shape, error = asdict(SHAPE.shape()), {"decode": {"mean": 0.0, "p50": 0.1, "p90": 0.1, "steps": 1}}
    write(Profile("slow", shape, 1, 1, terms(), terms(), error, {"device": "none"}), path)
    return path


def case_of(seed: int) -> Case:
    return random_case(seed, {})


def run_case(found: Registry, seed: int, native: str, folder: Path) -> Seen:
    """`folder` is for files that the run reads."""
    case = case_of(seed)
    Given.made["now"] = arrivals_of(case, Random(f"arrivals/{seed}"))
    return observed(build(found, composition(case, Random(f"roles/{seed}"), native, folder)))


def observed(run: Run) -> Seen:
    """Executes it, with its steps logged."""
    pieces: list[dict[str, Any]] = []
    run.step_log.readers.append(lambda steps: pieces.append(_plain(steps)))
    if run.step_log not in run.engine.observers:
        run.engine.observers.insert(0, run.step_log)
    run.engine.observers.append(Records())
    error = ""
    try:
        result = run.execute()
    except Exception as problem:
        error, result = f"{type(problem).__name__}: {problem}", getattr(problem, "partial", RunResult())
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    return Seen(fields, list(run.engine.clock.readings), pieces, result.loop, error)


class Records(Observer):
    """Has the clock keep its readings."""

    def on_start(self, engine: Any) -> None:
        engine.clock.record()


def _plain(steps: StepColumns) -> dict[str, Any]:
    plain = {name: values.tolist() for name, values in steps.numbers.items() if name != "policy_time"}
    for name in ("requests", "chunks", "preempted", "allocations", "allocation_sizes", "timings"):
        lists = getattr(steps, name)
        plain[name] = lists.values.tolist(), lists.offsets.tolist()
    return plain | {"timing_names": steps.timing_names}
