"""Every number that a composition takes, tried with values that are wrong, odd or at the edge of its range.

The tries follow from the registry and from the core's own config classes. Each ends in a verdict: the value
is refused when the run is composed, by an error that names `node.parameter=value`, or a small run ends, or
goes on producing tokens, with finite results.

    python -m tests.helpers.numeric            the whole matrix, with a table of verdicts
    python -m tests.helpers.numeric order slo  these nodes alone
"""

from __future__ import annotations

import json
import math
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Union, get_args, get_origin, get_type_hints
from zlib import crc32

import numpy as np

from core.compose.build import Composition, Run, build
from core.compose.config import EngineConfig, Hardware, ModelConfig
from core.compose.defaults import default_choices
from core.compose.hooks import Registry, load_registry
from core.compose.params import Limits, limits_of
from core.errors import HeadwayError
from core.inputs import SLO, Arrival, SamplingParams, Tags
from core.measure.metrics import summarize
from core.outside import Observer, Workload
from plugins.executors.sim import SimExecutor
from plugins.kernels.compose import GROUPS
from plugins.parallel.config import MeshConfig

CORE = {
    "engine": EngineConfig,
    "model": ModelConfig,
    "hardware": Hardware,
    "parallel": MeshConfig,
    "slo": SLO,
}
STEPS = 800  # after so many a run is long enough to see that it goes on
QUIET = 300  # so many without a token are a loop
CPU_SECONDS = 20.0  # without a step: a policy that loops
SHAPE = {
    "name_or_path": "numbers",
    "load_format": "dummy",
    "dtype": "float32",
    "architecture": "Qwen3ForCausalLM",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
}
LIMITS = {"block_size": 4, "num_blocks": 24, "max_num_seqs": 4, "max_num_batched_tokens": 64, "check": True}
#: What makes a run of a plugin small, where it has the parameter.
SMALL = {
    "num_requests": 6,
    "num_sessions": 4,
    "input_len": 6,
    "output_len": 3,
    "system_len": 4,
    "turns": 2,
    "duration": 2.0,
    "input_lens": [6],
    "output_lens": [3],
    "max_model_len": 256,
    "device": "cpu",
    "vocab_size": 64,
}


#: At their largest these are no small run, as everything arrives before the first step, unless requests come
#: as others end.
TAKEN_AT_ONCE = ("num_requests", "num_sessions", "turns")
#: Without a number where no client was served in the window that all of them share (docs/metrics.md).
MAY_BE_NAN = ("jain_index",)
#: What counts only where the number of blocks follows from the memory.
SIZE_THE_POOL = ("memory_gb", "memory_utilization", "activation_gb", "kv_cache_gb")


# ---- the tries -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    node: str  # of the config: "order"
    plugin: str  # "" for a node of the core
    parameter: str
    value: Any

    def __str__(self) -> str:
        shown = repr(self.value)
        chosen = f"{self.node}={self.plugin} " if self.plugin else ""
        return f"{chosen}{self.node}.{self.parameter}={shown if len(shown) < 60 else shown[:20] + '...'}"


def tries(registry: Registry) -> Iterator[Try]:
    for (role, name), plugin in sorted(registry.plugins.items()):
        for parameter, values in candidates(plugin.config) if role not in CORE else ():
            yield from (Try(role, name, parameter, value) for value in values)
    for node, config in {**CORE, "sampling": SamplingParams}.items():
        for parameter, values in candidates(config):
            yield from (Try(node, "", parameter, value) for value in values)
    yield from (Try("run", "", "seed", value) for value in odd(int, Limits(min=-(2**63), max=2**63 - 1)))


def candidates(config: type) -> Iterator[tuple[str, list[Any]]]:
    """Every parameter of a dataclass with the values to try."""
    hints = get_type_hints(config)
    for f in fields(config):
        if f.init:
            yield f.name, odd(hints[f.name], limits_of(f))


def odd(hint: Any, limits: Limits) -> list[Any]:
    """Values for one annotation: wrong ones, odd ones, and the edges of the range."""
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind is Union or kind is type(int | None):
        return unlike([value for arm in inside if arm is not NoneType for value in odd(arm, limits)] + [None])
    if is_dataclass(kind):
        return [math.nan, 1, "x", [], {}, {"no_such_field": 1}]
    if kind in (list, tuple):
        return [*([value] for value in odd(inside[0], limits)), [], math.nan, 1, "x"]
    if kind is dict:
        return [*({"c0": value} for value in odd(inside[1], limits)), {}, [], math.nan, 1, "x"]
    if kind is bool:
        return [math.nan, 2, 2.5, [], "x", None]
    if kind is str:
        return [math.nan, 1, 2.5, [], None, "no-such-choice"]
    wrong = [
        math.nan,
        math.inf,
        -math.inf,
        -1,
        0,
        2.5,
        1e308,
        -1e308,
        5e-324,
        2**63,
        -(2**63),
        10**400,
        True,
        None,
        [],
        "x",
    ]
    wrong += [np.float64("nan"), np.float32(0.5), np.int64(3), np.float32("inf")]
    return unlike(wrong + edges(kind, limits))


def edges(kind: type, limits: Limits) -> list[Any]:
    """The ends of a range and what lies just beyond them."""
    found: list[Any] = []
    for end, outwards in ((limits.min, -1), (limits.above, 1), (limits.max, 1), (limits.below, -1)):
        if end is not None:
            beyond = int(end) + outwards if kind is int else math.nextafter(end, outwards * math.inf)
            found += [kind(end), beyond]
    return found


def unlike(values: list[Any]) -> list[Any]:
    seen = {f"{type(value)}{value!r}": value for value in values}
    return list(seen.values())


# ---- one try ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    of: Try
    kind: str  # refused, ran or went on; everything else is a fault
    said: str = ""

    @property
    def wrong(self) -> bool:
        return self.kind not in ("refused", "ran", "went on")


class Enough(BaseException):
    """The run was watched for long enough."""


class Fault(BaseException):
    """(kind, what was seen) of a run that is watched; no plugin's `except Exception` may catch it."""


class Watch(Observer):
    """Ends a run after STEPS steps, and at once where tokens stop coming or time goes astray."""

    def on_start(self, engine: Any) -> None:
        self._steps = self._quiet = 0

    def on_step(self, record: Any) -> None:
        self._steps, self._quiet = self._steps + 1, 0 if record.emitted else self._quiet + 1
        if self._quiet > QUIET:
            raise Fault("loops", f"{QUIET} steps without a token")
        if not (math.isfinite(record.start) and record.start <= record.end < math.inf):
            raise Fault("not finite", f"step {record.step} from {record.start} to {record.end} s")
        if self._steps >= STEPS:
            raise Enough


@contextmanager
def bounded_cpu(seconds: float) -> Iterator[None]:
    """Raises Fault after so many CPU seconds of this process, whatever it waits for."""

    def ring(signum: int, frame: Any) -> None:
        raise Fault("loops", f"{seconds:g} CPU seconds without an end")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def judge(of: Try, registry: Registry, seconds: float = CPU_SECONDS) -> Verdict:
    try:
        with bounded_cpu(seconds):
            if of.node == "sampling":
                return answered(of)
            return ran(of, registry)
    except Fault as fault:
        return Verdict(of, *fault.args)


def ran(of: Try, registry: Registry) -> Verdict:
    try:
        run = composed(of, registry)
    except HeadwayError as error:
        return refused(of, error)
    except Exception as error:
        return Verdict(of, "raises when composed", f"{type(error).__name__}: {error}")
    try:
        result = run.execute()
    except Enough:
        said = unfinite(run)
        return Verdict(of, "not finite" if said else "went on", said)
    except HeadwayError as error:
        # What only the run can know, such as a backend that is not there; a policy that broke is a fault.
        said = str(error).splitlines()[0]
        return refused(of, error) if of.parameter in said else Verdict(of, "fails", said)
    except Exception as error:
        return Verdict(of, "raises", f"{type(error).__name__}: {error}")
    summary = {name: value for name, value in summarize(result).items() if isinstance(value, float)}
    strange = [name for name, value in summary.items() if math.isinf(value)]
    # else there is no time between two tokens
    if any(len(output.token_times) > 1 for output in result.outputs):
        undefined = [name for name, value in summary.items() if math.isnan(value) and name not in MAY_BE_NAN]
        strange += [name for name in undefined if not is_undefined(name, registry)]
    said = unfinite(run) or ("" if not strange else f"{', '.join(strange)} of the summary")
    return Verdict(of, "not finite" if said else "ran", said)


def refused(of: Try, error: Exception) -> Verdict:
    """Refused is right where the message names the parameter and shows the value, or for a list or table the
    part that is wrong."""
    said = str(error).splitlines()[0]
    name = of.parameter if of.node in ("sampling", "run") else f"{of.node}.{of.parameter}"
    if (of.value is None and name in said) or (isinstance(of.value, str) and of.value and of.value in said):
        return Verdict(of, "refused", said)  # "set model.hidden_size"; a name that another part looked up
    value = of.value.item() if hasattr(of.value, "item") else of.value
    parts = [f"{name}=[", f"{name}.c0=", f"{name}[0]"]
    plain = [f"{name}={value!r}", f"{name}={value}", f"{name}={str(value)[:40]}", *parts]
    return Verdict(of, "refused" if any(text in said for text in plain) else "refused without its name", said)


def unfinite(run: Run) -> str:
    """What a run left that no clock can show, "" where there is nothing."""
    for output in run.engine.roster.finished:
        times = [output.arrival_time, *output.token_times, output.finish_time]
        if not all(map(math.isfinite, times)) or any(a > b for a, b in zip(times, times[1:], strict=False)):
            return f"times of request {output.id}: {times[:3]} ... {times[-1]}"
    return "" if math.isfinite(run.engine.clock.now()) else "the run's clock"


@cache
def is_undefined(metric: str, registry: Registry) -> bool:
    """Whether a summary has no number for it in a run where nothing is odd."""
    value = summarize(composed(Try("run", "", "seed", 0), registry).execute()).get(metric, 0.0)
    return isinstance(value, float) and math.isnan(value)


def composed(of: Try, registry: Registry, directory: Path | None = None) -> Run:
    """A small run that holds the value."""
    given = {of.parameter: of.value}
    choices: dict[str, tuple[str, dict[str, Any]]] = {
        **default_choices(),
        "predictor": ("oracle", {}), "executor": ("speaking", {}), "workload": ("mixed", {}),
    }  # fmt: skip
    if of.plugin:
        known = {f.name for f in registry.get(of.node, of.plugin).parameters()}
        wanted = {**SMALL, **needs().get(of.plugin, {})}
        small = {name: value for name, value in wanted.items() if name in known}
        if of.parameter in TAKEN_AT_ONCE and "arrival" in known:
            small["arrival"] = "closed"
        choices[of.node] = of.plugin, {**small, **given}
    if of.plugin in ("preemptive", "selective", "jitserve") and of.node == "scheduler":
        choices["order"] = "sjf", {}
    if of.node == "kernels" or of.plugin == "torch":
        choices["executor"] = "torch", {"device": "cpu", **choices["executor"][1]}
    if choices["executor"][0] == "torch" and of.node == "executor":
        choices["executor"][1].setdefault("kv_cache_gb", 0.001)
    core = {node: given if of.node == node else {} for node in CORE}
    if of.parameter in SIZE_THE_POOL:
        core["engine"] = {"num_blocks": None}
    composition = Composition(
        choices,
        engine=EngineConfig(**{**LIMITS, **core["engine"]}),
        model=ModelConfig(**{**SHAPE, **core["model"]}),
        hardware=Hardware(**core["hardware"]),
        parallel=MeshConfig(**core["parallel"]),
        slo=SLO(**core["slo"]),
        **(given if of.node == "run" else {}),
    )
    return build(registry, composition, observers=[Watch()], directory=directory)


def answered(of: Try) -> Verdict:
    """A request with the value, on the real engine."""
    try:
        usual = {"max_tokens": 4, "temperature": 1.0, "seed": 1}
        parameters = SamplingParams(**{**usual, of.parameter: of.value})
    except (ValueError, HeadwayError) as error:
        return refused(of, error)
    except Exception as error:
        return Verdict(of, "raises when composed", f"{type(error).__name__}: {error}")
    try:
        answer = model().generate([[1, 2, 3, 4]], parameters)[0]
    except Exception as error:
        model.cache_clear()
        return Verdict(of, "raises", f"{type(error).__name__}: {error}".splitlines()[0])
    if answer.outputs[0].finish_reason == "rejected":
        named = of.parameter in answer.error
        return Verdict(of, "refused" if named else "refused without its name", answer.error)
    tokens = answer.outputs[0].token_ids
    fine = bool(tokens) and all(0 <= token < 512 for token in tokens)
    return Verdict(of, "ran" if fine else "not finite", answer.outputs[0].finish_reason)


@cache
def model() -> Any:
    from headway import LLM

    return LLM("tiny", num_blocks=512)


# ---- what the runs are made of ---------------------------------------------------------------------------


class Words:
    """A tokenizer for workloads of real text."""

    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()][:20]

    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))


@dataclass
class Speaking(SimExecutor):
    """The simulator with a tokenizer."""

    tokenizer = Words()


@dataclass
class Mixed(Workload):
    """Clients, sessions with tools, shared prefixes and deadlines: more than the small pool holds."""

    def arrivals(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        for i in range(24):
            own = range(i, i + 3 + 7 * (i % 3))
            prompt = [token % vocab_size for token in (*range(6), *own)]
            tags = Tags(
                f"c{i % 3}", f"s{i % 5}", i // 5, ("chat", "api")[i % 2], i % 3, "tool" if i % 2 else ""
            )
            slo = SLO(ttft=0.5, tpot=0.1) if i % 4 == 0 else SLO()
            sampling = SamplingParams(temperature=0.0, max_tokens=12)
            yield Arrival(0.0005 * i, prompt, sampling, output_len=2 + i % 9, tags=tags, slo=slo)


def numbered_registry() -> Registry:
    registry = load_registry()
    registry.add("workload", "mixed", Mixed)
    registry.add("executor", "speaking", Speaking)
    return registry


@cache
def needs() -> dict[str, dict[str, Any]]:
    """Plugin -> parameters that it does not run without here: a file, a record, no account for the
    tracker."""
    folder = Path(tempfile.mkdtemp(prefix="headway_numbers_"))
    lengths = {"input_length": 6, "output_length": 3}
    mooncake = [{"timestamp": 100 * i, "hash_ids": [i % 2], **lengths} for i in range(6)]
    write_lines(folder / "mooncake.jsonl", map(json.dumps, mooncake))
    azure = [f"2023-11-16 18:15:4{i}.6805900,6,3" for i in range(6)]
    write_lines(folder / "azure.csv", ["TIMESTAMP,ContextTokens,GeneratedTokens", *azure])
    burstgpt = [f"{i},6,3" for i in range(6)]
    write_lines(folder / "burstgpt.csv", ["Timestamp,Request tokens,Response tokens", *burstgpt])
    calls = [{"type": "n", "in": 6, "out": 3, "hash_ids": [0], "think_time": 0.1, "stop": "tool_use"}] * 3
    agents = [{"id": f"s{i}", "block_size": 4, "requests": calls} for i in range(3)]
    write_lines(folder / "agents.jsonl", map(json.dumps, agents))
    named: dict[str, dict[str, Any]] = {"wandb": {"mode": "disabled"}}
    # Without a GPU, so that the value that is tried is the only backend asked for.
    named |= dict.fromkeys(("triton", "flash_attn"), dict.fromkeys(GROUPS, "torch"))
    traces = {
        "mooncake": "mooncake.jsonl",
        "trace": "mooncake.jsonl",
        "azure": "azure.csv",
        "burstgpt": "burstgpt.csv",
        "agents": "agents.jsonl",
    }
    (folder / "record").mkdir()
    run = composed(Try("run", "", "seed", 0), numbered_registry(), folder / "record")
    run.execute()
    named["replay"] = {"path": str(folder / "record")}
    return named | {name: {"path": str(folder / file)} for name, file in traces.items()}


def write_lines(file: Path, lines: Iterable[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines))


# ---- the table -------------------------------------------------------------------------------------------


def slice_of(all_tries: list[Try], share: int) -> list[Try]:
    """Every share-th try by its own checksum, so that the same are chosen whatever else there is."""
    return [of for of in all_tries if crc32(str(of).encode()) % share == 0]


@dataclass
class Table:
    verdicts: list[Verdict] = field(default_factory=list)

    def __str__(self) -> str:
        nodes = sorted({verdict.of.node for verdict in self.verdicts})
        lines = [f"{'node':<12}{'tries':>7}{'refused':>9}{'ran':>6}{'went on':>9}{'wrong':>7}"]
        for node in [*nodes, "all"]:
            mine = [verdict for verdict in self.verdicts if node in ("all", verdict.of.node)]
            counts = [sum(verdict.kind == kind for verdict in mine) for kind in ("refused", "ran", "went on")]
            wrong = sum(verdict.wrong for verdict in mine)
            lines.append(f"{node:<12}{len(mine):>7}{counts[0]:>9}{counts[1]:>6}{counts[2]:>9}{wrong:>7}")
        return "\n".join(lines)


def main(nodes: list[str], report: Callable[[str], None] = print) -> int:
    registry = numbered_registry()
    table = Table()
    for of in tries(registry):
        if not nodes or of.node in nodes:
            table.verdicts.append(judge(of, registry))
    report(str(table))
    for verdict in table.verdicts:
        if verdict.wrong:
            report(f"  {verdict.of}: {verdict.kind}: {verdict.said}")
    return int(any(verdict.wrong for verdict in table.verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
