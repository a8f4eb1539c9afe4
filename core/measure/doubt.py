"""Which differences between runs mean something: more than the time model's stated error and the spread over
seeds explain.

Two compositions tie in a metric when the difference of their means over seeds is at most

    error * (larger of the two means)  +  sqrt(s_a^2 + s_b^2)

where `error` is the relative error of a step's time that the model states for itself (0 where times were
measured, and for metrics that are no times), and s the standard deviation over the seeds of a composition (0
where there is one seed, which is said).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..policy import ROLES
from .metrics import LATENCIES, PERCENTILES

#: Metrics that scale with the times of steps.
TIMES = frozenset(
    {"duration", "request_throughput", "output_throughput", "total_token_throughput", "request_goodput"}
) | {f"{kind}_{name}_ms" for name in LATENCIES for kind in ("mean", *(f"p{p}" for p in PERCENTILES))}
MORE_IS_BETTER = frozenset(
    {
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
        "request_goodput",
        "prefix_hit_rate",
        "jain_index",
        "slo_attainment",
    }
)
LESS_IS_BETTER = (TIMES - MORE_IS_BETTER) | {
    "preemptions",
    "service_difference",
    "evictions",
    "recomputed_tokens",
}
#: Nodes of a composition that are no policy: runs that differ in them do not compete.
SETTING = (
    "workload",
    "executor",
    "kernels",
    "parallel",
    "model",
    "hardware",
    "engine",
    "slo",
    "results",
    "tracking",
    "hydra",
)
POLICIES = frozenset({*ROLES, "policy"} - {*SETTING, "observer"})
TIE = "="


@dataclass
class Competitor:
    """A composition's runs with different seeds, in one setting."""

    setting: tuple[tuple[str, str], ...]  # what is varied beside policies and seed
    policies: tuple[tuple[str, str], ...]
    runs: list[dict[str, Any]] = field(default_factory=list)  # results, as results.read_results answers them

    def values(self, metric: str) -> list[float]:
        """Of each seed; those of unfinished runs and missing ones are left out."""
        found = (run["summary"].get(metric) for run in self.runs if run["status"] == "finished")
        return [float(value) for value in found if isinstance(value, (int, float)) and math.isfinite(value)]

    @property
    def error(self) -> float | None:
        """Stated by the time model of its runs, the largest; 0 where times were measured, None where it
        states none."""
        errors = [
            run["summary"].get("time_model_error") if "time_model" in run["summary"] else 0.0
            for run in self.runs
        ]
        return (
            None
            if None in errors
            else max((float(error) for error in errors if error is not None), default=0.0)
        )

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.policies) or "as it is"


def competitors(results: Sequence[dict[str, Any]], varied: Iterable[str]) -> list[Competitor]:
    """The compositions of a sweep, in the order of their first runs. `varied`: the override keys that are not
    the same in all."""
    found: dict[Any, Competitor] = {}
    keys = list(map(key_of, varied))
    for run in results:
        own = {key_of(override): override.partition("=")[2] for override in run["overrides"]}
        chosen = [(key, own.get(key, "")) for key in keys if key != "seed"]
        policies = tuple(pair for pair in chosen if is_policy(pair[0]))
        setting = tuple(pair for pair in chosen if not is_policy(pair[0]))
        found.setdefault((setting, policies), Competitor(setting, policies)).runs.append(run)
    return list(found.values())


def key_of(override: str) -> str:
    """What an override sets: order.weights of +order.weights={a:1}."""
    return override.partition("=")[0].lstrip("+~")


def within(override: str, nodes: Iterable[str]) -> bool:
    """Whether an override sets one of these nodes, or something in one of them."""
    key = key_of(override)
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


def is_policy(key: str) -> bool:
    """Whether an override chooses a policy or a parameter of one: order, order.weights, policy."""
    return key.partition(".")[0] in POLICIES


def doubt(metric: str, a: Sequence[float], b: Sequence[float], error: float) -> float:
    """How far apart the means of two compositions may be and still tie."""
    of_model = error * max(abs(statistics.fmean(a)), abs(statistics.fmean(b))) if metric in TIMES else 0.0
    return of_model + math.hypot(_spread(a), _spread(b))


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def verdict(metric: str, a: Sequence[float], b: Sequence[float], error: float) -> int:
    """1 where a is better than b, -1 where it is worse, 0 for a tie; the metric is one with a better side."""
    difference = statistics.fmean(a) - statistics.fmean(b)
    if abs(difference) <= doubt(metric, a, b, error):
        return 0
    return 1 if (difference > 0) == (metric in MORE_IS_BETTER) else -1


def ties(found: Sequence[Competitor], metric: str) -> list[list[int]]:
    """Of each composition, the places of those that it ties with in its setting; nobody ties in a metric
    without a better side, nor without values, nor where a time is compared whose error is not stated."""
    tied: list[list[int]] = [[] for _ in found]
    if metric not in MORE_IS_BETTER | LESS_IS_BETTER:
        return tied
    values = [competitor.values(metric) for competitor in found]
    for i, one in enumerate(found):
        for j, other in enumerate(found[:i]):
            if one.setting != other.setting or not values[i] or not values[j]:
                continue
            errors = (one.error, other.error)
            if metric in TIMES and None in errors:
                continue
            if verdict(metric, values[i], values[j], max(error or 0.0 for error in errors)) == 0:
                tied[i].append(j)
                tied[j].append(i)
    return tied


def best(found: Sequence[Competitor], metric: str) -> set[int]:
    """The places of the best mean in each setting, where more than one composition has one."""
    leaders: set[int] = set()
    for setting in dict.fromkeys(competitor.setting for competitor in found):
        means = {
            i: statistics.fmean(v)
            for i, c in enumerate(found)
            if c.setting == setting and (v := c.values(metric))
        }
        if len(means) > 1:
            leaders.add(max(means, key=lambda i: means[i] if metric in MORE_IS_BETTER else -means[i]))
    return leaders


def stated(error: float | None) -> str:
    """An error in words."""
    return "its error was never measured" if error is None else f"stated error of a step's time {error:.1%}"


def legend(found: Sequence[Competitor]) -> list[str]:
    """What the marks mean, and what they cannot know."""
    if not any(one.setting == other.setting for i, one in enumerate(found) for other in found[:i]):
        return []
    summaries = [run["summary"] for competitor in found for run in competitor.runs]
    if not any(TIMES & summary.keys() for summary in summaries):
        return []
    models = dict.fromkeys(
        f"{s['time_model']} ({stated(s['time_model_error'])})" for s in summaries if "time_model" in s
    )
    times = f"simulated by {'; '.join(models)}" if models else "measured"
    alone = all(len(competitor.runs) == 1 for competitor in found)
    seeds = " One seed each: the spread over seeds is not known." if alone else ""
    lines = [
        f"{TIE} ties with the best of its column, among runs that differ in policies alone: the difference "
        f"is within the time model's stated error plus the spread over seeds. Times are {times}.{seeds}"
    ]
    if any(competitor.error is None for competitor in found):
        lines.append(
            "warning: a time model states no error, so nobody knows which differences between its times mean "
            "something"
        )
    return lines


@dataclass(frozen=True)
class Marks:
    """Which cells of a comparison tie."""

    found: list[Competitor]

    @classmethod
    def of(cls, results: Sequence[dict[str, Any]], varied: Iterable[str]) -> Marks:
        return cls(competitors(results, varied))

    def marked(self, metric: str) -> set[str]:
        """Directories of the runs that tie with the best of their setting, the best among them; of none where
        it stands alone."""
        tied, leaders = ties(self.found, metric), best(self.found, metric)
        places = {place for leader in leaders if tied[leader] for place in (leader, *tied[leader])}
        return {run["directory"] for place in places for run in self.found[place].runs}

    def tied(self, metrics: Iterable[str]) -> dict[str, dict[str, list[str]]]:
        """Directory of a run -> metric -> directories of the runs that it ties with."""
        found: dict[str, dict[str, list[str]]] = {}
        for metric in metrics:
            for competitor, others in zip(self.found, ties(self.found, metric), strict=True):
                there = [run["directory"] for place in sorted(others) for run in self.found[place].runs]
                for run in competitor.runs if there else ():
                    found.setdefault(run["directory"], {})[metric] = there
        return found
