"""How well one set of runs stands for another, as a simulation does for a GPU: errors of every metric, and of
the rankings.

    python -m experiments.fidelity compare SIMULATED MEASURED [MEASURED ...] [--out FILE.md] [--json FILE]

Each folder is a sweep's (`python run.py -m ...`), of this or another machine; only result.json of each run is
read. Compositions are matched by what is varied in a sweep and decides something: who runs the plans,
kernels, files and seed do not count. Runs of one composition with other seeds, or from further folders of the
second kind, are repeats.

Errors are of the means over repeats, against the second kind, beside the spread of its repeats (largest minus
smallest over mean). Of each pair of compositions in one setting (workload, engine), each side says better,
worse or tie (core/measure/doubt.py); Kendall's tau-b compares the rankings by value and by these verdicts. An
error that a time model does not state counts as 0 here, and the report says that it is unknown.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import HeadwayError
from core.measure import results
from core.measure.doubt import Competitor, competitors, verdict, within
from core.measure.metrics import LATENCIES, PERCENTILES
from core.measure.report import table

#: What is compared: summary key, heading.
METRICS = (
    *(
        (f"{kind}_{name}_ms", f"{name.upper()} {kind}")
        for name in LATENCIES
        for kind in ("mean", *(f"p{p}" for p in PERCENTILES))
    ),
    ("request_throughput", "requests/s"),
    ("output_throughput", "tokens/s"),
    ("preemptions", "preemptions"),
    ("prefix_hit_rate", "hit rate"),
)
#: Overrides that say how a run is made or kept and not what it decides.
BESIDE = ("executor", "kernels", "tracking", "results", "hydra", "hardware", "seed", "model.load_format")
REPEATED = ("seed",)
WORDS = {1: "better", -1: "worse", 0: "tie"}


@dataclass(frozen=True)
class Matched:
    """One composition on both sides."""

    a: Competitor
    b: Competitor

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in (*self.a.setting, *self.a.policies)) or "as it is"

    def means(self, metric: str) -> tuple[float, float] | None:
        """Over repeats, of both sides; None where one has no such number."""
        sides = [side.values(metric) for side in (self.a, self.b)]
        return (statistics.fmean(sides[0]), statistics.fmean(sides[1])) if all(sides) else None

    def error(self, metric: str) -> float | None:
        """Relative to the second side; None where it is 0 or has no such number."""
        means = self.means(metric)
        return None if means is None or means[1] == 0 else means[0] / means[1] - 1

    def spread(self, metric: str) -> float | None:
        """Of the second side's repeats, relative; None for one."""
        values = self.b.values(metric)
        mean = statistics.fmean(values) if values else 0.0
        return (max(values) - min(values)) / mean if len(values) > 1 and mean else None


@dataclass(frozen=True)
class Pair:
    """Two compositions of one setting in one metric, as both sides see them: 1 where the first is better, -1
    worse, 0 a tie."""

    first: Matched
    second: Matched
    a: int
    b: int
    by_value: tuple[int, int]  # which mean is the smaller one, on each side


def matched(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[list[Matched], list[str]]:
    """Compositions that both sides ran, and words on those that only one did. Raises HeadwayError where there
    are none."""
    for side in (a, b):
        if several := [key for key in results.varied(side) if within(key, BESIDE) and key not in REPEATED]:
            mixed = f"{', '.join(several)} is not the same in all runs of a side"
            raise HeadwayError(
                f"{mixed}, and runs that differ in it are no repeats: compare one value at a time"
            )
    keys = [key for key in dict.fromkeys([*results.varied(a), *results.varied(b)]) if not within(key, BESIDE)]
    sides = [{(c.setting, c.policies): c for c in competitors(side, keys)} for side in (a, b)]
    found = [Matched(sides[0][name], sides[1][name]) for name in sides[0] if name in sides[1]]
    alone = []
    for which, own, other in (("first", *sides), ("second", *reversed(sides))):
        for setting, policies in own.keys() - other.keys():
            alone.append(f"only in the {which}: {' '.join(f'{k}={v}' for k, v in (*setting, *policies))}")
    alone.sort()
    if not found:
        raise HeadwayError("no composition is on both sides:" + "".join(f"\n  {line}" for line in alone))
    return found, alone


def pairs(found: Sequence[Matched], metric: str) -> Iterator[Pair]:
    """Of the compositions of each setting that have the metric on both sides."""
    for first, second in combinations(found, 2):
        if first.a.setting != second.a.setting:
            continue
        sides = []
        for one, other in ((first.a, second.a), (first.b, second.b)):
            mine, theirs = one.values(metric), other.values(metric)
            if not mine or not theirs:
                break
            error = max(one.error or 0.0, other.error or 0.0)
            order = statistics.fmean(mine) - statistics.fmean(theirs)
            sides.append((verdict(metric, mine, theirs, error), (order > 0) - (order < 0)))
        else:
            (a, a_order), (b, b_order) = sides
            yield Pair(first, second, a, b, (a_order, b_order))


def kendall(orders: Sequence[tuple[int, int]]) -> float:
    """Tau-b of pairs that both sides call 1, -1 or 0: agreements minus contradictions over the geometric mean
    of the pairs that each side tells apart. nan where a side tells none apart."""
    told = [sum(order[side] != 0 for order in orders) for side in (0, 1)]
    return sum(a * b for a, b in orders) / math.sqrt(told[0] * told[1]) if all(told) else math.nan


# ---- what is read and written ------------------------------------------------------------------------------


def read(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The finished runs of sweeps. Raises HeadwayError where there are none."""
    runs: list[dict[str, Any]] = []
    for folder in folders:
        found, problems = results.read_results(folder)
        for problem in problems:
            print(f"warning: {problem}", file=sys.stderr)
        finished = [run for run in found if run["status"] == "finished"]
        if not finished:
            raise HeadwayError(f"{folder}: holds no finished run; expected the folder of a sweep (run.py -m)")
        runs += finished
    return runs


def compared(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that the report says, as data."""
    found, alone = matched(a, b)
    rankings = {}
    for metric, _ in METRICS:
        seen = list(pairs(found, metric))
        rankings[metric] = {
            "tau": _plain(kendall([pair.by_value for pair in seen])),
            "tau_by_verdict": _plain(kendall([(pair.a, pair.b) for pair in seen])),
            "same_verdict": sum(pair.a == pair.b for pair in seen),
            "opposite_verdict": sum(pair.a * pair.b < 0 for pair in seen),
            "pairs": [
                {"first": str(p.first), "second": str(p.second), "a": WORDS[p.a], "b": WORDS[p.b]}
                for p in seen
            ],
        }
    return {
        "time_models": _time_models(a, b),
        "alone": alone,
        "compositions": [
            {
                "name": str(one),
                "repeats": [len(one.a.runs), len(one.b.runs)],
                "metrics": {
                    metric: {
                        "a": means[0],
                        "b": means[1],
                        "error": one.error(metric),
                        "spread": one.spread(metric),
                    }
                    for metric, _ in METRICS
                    if (means := one.means(metric)) is not None
                },
            }
            for one in found
        ],
        "rankings": rankings,
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _time_models(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[list[str]]:
    """Where the times of each side come from."""

    def told(run: dict[str, Any]) -> str:
        s = run["summary"]
        if "time_model" not in s:
            return "measured"
        error = s["time_model_error"]
        return f"{s['time_model']}, stated error {'unknown' if error is None else f'{error:.1%}'}"

    return [list(dict.fromkeys(map(told, side))) for side in (a, b)]


def page(data: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = ["# Fidelity", ""]
    lines += [
        f"- {side}: {'; '.join(models)}" for side, models in zip("AB", data["time_models"], strict=True)
    ]
    lines += [f"- {line}" for line in data["alone"]]
    lines += [
        "",
        "Error of A against B, with the spread of B's repeats (largest minus smallest over mean) behind it.",
        "",
    ]
    rows = [["composition", *(heading for _, heading in METRICS)]]
    for one in data["compositions"]:
        rows.append([one["name"], *(_cell(one["metrics"].get(metric)) for metric, _ in METRICS)])
    lines += [table(rows, markdown=True), "", "Rankings, over the pairs of compositions in one setting.", ""]
    ranks = [["metric", "tau", "tau by verdict", "same verdict", "opposite", "pairs"]]
    for metric, heading in METRICS:
        found = data["rankings"][metric]
        taus = ["-" if found[key] is None else f"{found[key]:.2f}" for key in ("tau", "tau_by_verdict")]
        ranks.append(
            [
                heading,
                *taus,
                *(str(found[key]) for key in ("same_verdict", "opposite_verdict")),
                str(len(found["pairs"])),
            ]
        )
    lines += [table(ranks, markdown=True), "", "Pairs on which A and B do not say the same.", ""]
    differ = [["metric", "first", "second", "A: first is", "B: first is"]]
    for metric, heading in METRICS:
        differ += [
            [heading, p["first"], p["second"], p["a"], p["b"]]
            for p in data["rankings"][metric]["pairs"]
            if p["a"] != p["b"]
        ]
    lines.append(table(differ, markdown=True) if len(differ) > 1 else "None.")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["error"] is None:  # B has 0 of it
        return "=" if found["a"] == found["b"] else f"{found['a']:g} for 0"
    spread = "" if found["spread"] is None else f" ({found['spread']:.1%})"
    return f"{found['error']:+.1%}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("compare", help="two stored sets of runs")
    verb.add_argument("a", type=Path, metavar="SIMULATED", help="folder of a sweep")
    verb.add_argument(
        "b", type=Path, nargs="+", metavar="MEASURED", help="folders of sweeps; more than one are repeats"
    )
    verb.add_argument("--out", type=Path, help="write the report there")
    verb.add_argument("--json", type=Path, help="write its numbers there")
    options = parser.parse_args(argv)
    try:
        data = compared(read([options.a]), read(options.b))
    except HeadwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = page(data)
    print(text)
    if options.out:
        results.write_text(options.out, text)
    if options.json:
        results.write_text(options.json, json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
