"""`python -m headway whatif RUN order=srpt,vtc`: what a recorded run would have been like with other
policies.

The run's own composition is simulated again, with its limits and with a clock that is fitted to its steps,
once as it was and once for each change. How far the first is from the record, and how far the clock is from
steps that its fit has not seen, is what a difference has to exceed. Of another server's run, which its
clients recorded (`vllm bench serve`), the composition is what `--server` says.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from ..compose.build import build, check
from ..compose.hooks import Registry, load_registry
from ..errors import ConfigError, HeadwayError
from ..measure.doubt import LESS_IS_BETTER, MORE_IS_BETTER, POLICIES, TIMES, is_policy, verdict, within
from ..measure.metrics import summarize
from ..measure.report import table
from ..outside import Observer, StepRecord
from ..renamed import renamed
from . import presets, schema
from .explain import explain
from .recorded import OfClients, Recorded

METRICS = (
    ("mean_ttft_ms", "TTFT mean ms"),
    ("p99_ttft_ms", "TTFT P99 ms"),
    ("mean_tpot_ms", "TPOT mean ms"),
    ("p99_itl_ms", "ITL P99 ms"),
    ("mean_e2el_ms", "E2EL mean ms"),
    ("p99_e2el_ms", "E2EL P99 ms"),
    ("output_throughput", "tokens/s"),
    ("request_goodput", "goodput/s"),
    ("prefix_hit_rate", "hit rate"),
    ("preemptions", "preemptions"),
    ("jain_index", "Jain"),
    ("service_difference", "service difference"),
)
WORDS = {1: "better", -1: "worse", 0: "="}


@dataclass(frozen=True)
class Outcome:
    """A simulated run."""

    name: str  # what was changed; "" for the run as it was
    summary: dict[str, Any]
    outside: float  # share of its steps that are larger than any that the record holds


class Sizes(Observer):
    """How many steps of a run hold more tokens or requests than the largest of the record."""

    plugin_name = "whatif"

    def __init__(self, most_tokens: int, most_requests: int) -> None:
        self._most = most_tokens, most_requests
        self._steps = self._outside = 0

    def on_step(self, record: StepRecord) -> None:
        tokens, requests = self._most
        self._steps += 1
        self._outside += record.plan.num_tokens > tokens or len(record.plan.requests) > requests

    @property
    def share(self) -> float:
        return self._outside / self._steps if self._steps else 0.0


# ---- the changes -------------------------------------------------------------------------------------------


def changes(words: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of the values that each word lists. Raises ConfigError for a word that changes no
    policy."""
    choices: list[list[str]] = []
    for word in map(renamed, words):
        key, equals, _ = word.partition("=")
        if not equals or not is_policy(key):
            expected = f"expected POLICY=NAME or POLICY.parameter=VALUE, of {', '.join(sorted(POLICIES))}"
            alone = "executor=sim executor.like=RUN executor.profile=RUN"
            other = f"another workload, model or card is a run of its own: {alone}"
            raise ConfigError(f"{word}: {expected}; {other}")
        try:
            parsed = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise ConfigError(f"{word}: {error}") from error
        choices.append(
            [f"{key}={item}" for item in parsed.sweep_string_iterator()]
            if parsed.is_sweep_override()
            else [word]
        )
    for chosen in product(*choices):
        yield list(chosen)


def changed(words: Sequence[str], change: Sequence[str]) -> list[str]:
    """A run's words with some of them replaced: a role that gets another plugin loses the parameters of the
    one before it, and a preset takes over the roles that it fills."""
    replaced = {word.partition("=")[0] for word in change}
    for word in change:
        key, _, name = word.partition("=")
        if key == "policy":
            replaced |= {chosen.partition("=")[0].partition(".")[0] for chosen in presets.words(name)}
    gone = [word for word in words if not within(word, replaced)]
    return [*gone, *change]


# ---- running -----------------------------------------------------------------------------------------------


class Simulations:
    """Runs of the recorded composition with the recorded limits, in time that was fitted to the record."""

    def __init__(self, recorded: Recorded | OfClients) -> None:
        self.recorded, self.registry = recorded, _registered()
        self._own = ["executor=sim", *recorded.own(), "tracking=none", "results=summary"]

    def composed(self, words: Sequence[str]) -> DictConfig:
        try:
            return schema.composed([*words, *self._own])
        except HydraException as error:
            raise ConfigError(explain(error, self.registry)) from error

    def outcomes(self, found: Sequence[list[str]]) -> tuple[list[Outcome], str]:
        """As it was, then each change; all are checked before the first one runs. And what is to be said of
        the requests."""
        as_it_was = self.composed(self.recorded.words)
        self.recorded.check_composition(as_it_was)
        configs = [as_it_was, *(self.composed(changed(self.recorded.words, change)) for change in found)]
        for cfg in configs:
            check(self.registry, schema.composition(cfg))
        outcomes, said, largest = [], "", self.recorded.largest_step(as_it_was)
        for cfg, change in zip(configs, ([], *found), strict=True):
            sizes = Sizes(*largest)
            result = build(self.registry, schema.composition(cfg), [sizes]).execute()
            if not change:
                said = self.recorded.check_requests(result)
            outcomes.append(Outcome(" ".join(change), summarize(result), sizes.share))
        return outcomes, said


def _registered() -> Registry:
    registry = load_registry()
    schema.register(registry)
    return registry


# ---- what is said ------------------------------------------------------------------------------------------


def compared(recorded: dict[str, Any], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row per metric that all runs have: recorded, simulated as it was, and of each change its value,
    difference and verdict."""
    base, *others = outcomes
    stated = base.summary["time_model_error"]
    rows = []
    for metric, heading in METRICS:
        then, now = _known(recorded.get(metric)), _known(base.summary.get(metric))
        if then is None or now is None:
            continue
        off = abs(now / then - 1) if then else None
        error = max(off or 0.0, stated if metric in TIMES else 0.0)
        row: dict[str, Any] = {
            "metric": metric,
            "heading": heading,
            "recorded": then,
            "as_it_was": now,
            "doubt": error,
        }
        row["changes"] = [_change(metric, now, _known(other.summary.get(metric)), error) for other in others]
        rows.append(row)
    return rows


def _change(metric: str, base: float, value: float | None, error: float) -> dict[str, Any]:
    """`error` holds for every metric here: what the simulation was off by in this one."""
    if value is None:
        return {"value": None, "change": None, "verdict": None}
    told = None
    if metric in MORE_IS_BETTER | LESS_IS_BETTER:
        tied = abs(value - base) <= error * max(abs(value), abs(base))
        told = WORDS[0] if tied else WORDS[verdict(metric, [value], [base], 0.0)]
    return {"value": value, "change": value / base - 1 if base else None, "verdict": told}


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def page(
    recorded: Recorded | OfClients, outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]], said: str
) -> str:
    base, *others = outcomes
    limits = "" if isinstance(recorded, OfClients) else " with its limits"
    lines = [f"{recorded.directory}, simulated again{limits}", f"clock: {base.summary['time_model']}"]
    words = [other.name.split(" ") for other in others]
    same = [word for word in words[0] if len(others) > 1 and all(word in each for each in words)]
    lines += [f"every change has {' '.join(same)}"] if same else []
    names = [" ".join(word for word in each if word not in same) for each in words]
    lines += [f"note: {said}"] if said else []
    for other in others:
        if other.outside:
            lines.append(
                f"note: {other.outside:.1%} of the steps with {other.name} are larger than any that was "
                "recorded: the clock is extrapolated"
            )
    heading = ["", "recorded", "as it was", "off by", *names]
    cells = [heading]
    for row in rows:
        off = f"{row['as_it_was'] / row['recorded'] - 1:+.1%}" if row["recorded"] else "-"
        cells.append(
            [
                row["heading"],
                _number(row["recorded"]),
                _number(row["as_it_was"]),
                off,
                *map(_told, row["changes"]),
            ]
        )
    rule = (
        "= is a difference from the run as it was, simulated, within what the simulation was off by in that\n"
        "metric or, for times, within the clock's stated error, whichever is larger. One seed: the spread\n"
        "over seeds is not in it."
    )
    return "\n".join([*lines, "", table(cells), "", rule])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:,.3g}"


def _told(change: dict[str, Any]) -> str:
    if change["value"] is None:
        return "-"
    size = "" if change["change"] is None else f" ({change['change']:+.1%})"
    return f"{_number(change['value'])}{size} {change['verdict'] or ''}".rstrip()


def _read(run: Path, server: Sequence[str]) -> Recorded | OfClients:
    if run.is_file():
        if not server:
            example = (
                "--server model=qwen3_8b hardware=h100 policy=vllm_v1 engine.max_num_batched_tokens=2048"
            )
            raise HeadwayError(f"{run}: what served it? Say so in run.py's words, as {example}")
        return OfClients.read(run, server)
    if server:
        raise HeadwayError(f"--server is about the file of a benchmark's clients: {run} is none")
    return Recorded.read(run)


def whatif(argv: list[str]) -> int:
    about = "What a recorded run would have been like with other policies, and how sure that is."
    parser = argparse.ArgumentParser(prog="python -m headway whatif", description=about)
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="the directory of a finished run with its tables and record (results=all), or the file of "
        "`vllm bench serve --save-result --save-detailed`",
    )
    parser.add_argument(
        "words", nargs="+", metavar="POLICY=NAME[,NAME...]", help="order=srpt,vtc policy=sarathi"
    )
    parser.add_argument(
        "--server",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="what served that file, in run.py's words: model=qwen3_8b hardware=h100 policy=vllm_v1 ...",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    options = parser.parse_args(argv)
    recorded = _read(options.run, options.server)
    found = list(changes(options.words))
    outcomes, said = Simulations(recorded).outcomes(found)
    rows = compared(recorded.summary, outcomes)
    if options.json:
        about_runs = [{"change": other.name, "steps_outside": other.outside} for other in outcomes[1:]]
        base = outcomes[0].summary
        clock = {"name": base["time_model"], "error": base["time_model_error"]}
        json.dump(
            {"clock": clock, "note": said, "changes": about_runs, "metrics": rows}, sys.stdout, indent=2
        )
        print()
    else:
        print(page(recorded, outcomes, rows, said))
    return 0
