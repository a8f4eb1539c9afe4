"""Every metric, computed once, from what a run left behind. Definitions are those of `vllm bench serve`; see
docs/metrics.md.

All inputs are seconds on the run's clock; what is reported in milliseconds or microseconds says so in its
name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from ..outputs import RequestOutput, RunResult
from .fairness import fairness

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
FINISHED = "finished"


def ttft(o: RequestOutput) -> float | None:
    """Arrival to first token, seconds; None before there is one."""
    return o.token_times[0] - o.arrival_time if o.token_times else None


def e2el(o: RequestOutput) -> float | None:
    """Arrival to last token, seconds."""
    return o.token_times[-1] - o.arrival_time if o.token_times else None


def tpot(o: RequestOutput) -> float | None:
    """(E2EL - TTFT) / (n - 1), seconds; None for fewer than two tokens."""
    return (
        (o.token_times[-1] - o.token_times[0]) / (len(o.token_times) - 1) if len(o.token_times) > 1 else None
    )


def itl(o: RequestOutput) -> list[float]:
    """Every gap between consecutive tokens, seconds."""
    return [b - a for a, b in zip(o.token_times, o.token_times[1:], strict=False)]


def percentile(ordered: Sequence[float], p: float) -> float:
    """Of sorted values, interpolated linearly between the two nearest ranks (numpy's default); nan for
    none."""
    if not len(ordered):
        return math.nan
    at = (len(ordered) - 1) * p / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def meets_slo(o: RequestOutput) -> bool | None:
    """True if every target of the request was met, False for a miss, None where it has no target.

    A request that did not finish misses. A single token has no TPOT, so it meets any.
    """
    targets = ((o.slo.ttft, ttft(o)), (o.slo.tpot, tpot(o)), (o.slo.e2el, e2el(o)))
    if all(target is None for target, _ in targets):
        return None
    return o.state == FINISHED and all(
        target is None or value is None or value <= target for target, value in targets
    )


def summarize(result: RunResult) -> dict[str, Any]:
    """The run's numbers by name, flat. Latencies are of finished requests."""
    outputs = result.outputs
    done = [o for o in outputs if o.state == FINISHED]
    duration = result.duration
    generated = sum(len(o.token_times) for o in outputs)
    prompts = sum(o.num_prompt_tokens for o in done)
    summary: dict[str, Any] = {
        "status": result.status,
        "num_requests": len(outputs),
        "completed": len(done),
        "rejected": sum(o.state == "rejected" for o in outputs),
        "aborted": sum(o.state == "aborted" for o in outputs),
        "duration": duration,
        "num_steps": result.num_steps,
        "total_input_tokens": prompts,
        "total_output_tokens": generated,
        "request_throughput": _over(len(done), duration),
        "output_throughput": _over(generated, duration),
        "total_token_throughput": _over(generated + prompts, duration),
    }
    for name, values in _latencies(done).items():
        summary |= _distribution(name, values)
    admitted = [o for o in outputs if o.first_scheduled_time >= 0]
    summary |= {
        "prefix_hit_rate": _over(
            sum(o.num_cached_tokens for o in admitted), sum(o.num_prompt_tokens for o in admitted)
        ),
        "cached_tokens": sum(o.num_cached_tokens for o in admitted),
        "recomputed_tokens": sum(o.num_recomputed_tokens for o in outputs),
        "preemptions": result.num_preemptions,
        "pauses": result.num_pauses,
        "evictions": result.num_evictions,
        "planned_tokens": result.planned_tokens,
        "kv_blocks": result.kv_total,
        "kv_peak": result.kv_peak,
        "kv_peak_use": _over(result.kv_peak, result.kv_total),
        "busy_share": _over(result.busy_time, duration),
        "policy_time": result.policy_time,
        "policy_time_per_step_us": _over(result.policy_time * 1e6, result.num_steps),
        "warmup_seconds": result.warmup_seconds,
        "late_preparations": result.late_preparations,
        "step_time_basis": result.step_time_basis,
        "decision_hash": result.decision_hash,
    }
    if result.time_model is not None:
        summary |= {"time_model": result.time_model.name, "time_model_error": result.time_model.error}
    verdicts = [v for v in map(meets_slo, outputs) if v is not None]
    if verdicts:
        summary |= {
            "slo_attainment": sum(verdicts) / len(verdicts),
            "request_goodput": _over(sum(verdicts), duration),
        }
    if summary["rejected"]:
        summary["rejections"] = rejections(outputs)
    if result.derived:
        summary["derived"] = result.derived
    if result.saw_truth:
        summary["saw_truth"] = ", ".join(result.saw_truth)
    return summary | {"loop": result.loop} | fairness(outputs)


_PARTICULARS = re.compile(r"'[^']*'|\d+")  # what tells two refusals of one kind apart: names and numbers


def rejections(outputs: Iterable[RequestOutput]) -> list[dict[str, Any]]:
    """Why requests were rejected: {"count", "reason"} a kind, the commonest first, in the words of its first
    request."""
    reasons = [o.finish_reason for o in outputs if o.state == "rejected"]
    first = {_PARTICULARS.sub("", reason): reason for reason in reversed(reasons)}
    counts = Counter(_PARTICULARS.sub("", reason) for reason in reasons)
    return [{"count": count, "reason": first[kind]} for kind, count in counts.most_common()]


def _latencies(done: Sequence[RequestOutput]) -> dict[str, list[float]]:
    return {
        "ttft": [v for v in map(ttft, done) if v is not None],
        "tpot": [v for v in map(tpot, done) if v is not None],
        "itl": _gaps(done),
        "e2el": [v for v in map(e2el, done) if v is not None],
    }


def _gaps(done: Sequence[RequestOutput]) -> list[float]:
    """`itl` of each, one after the other: there are millions of them."""
    import numpy as np

    times = np.fromiter(chain.from_iterable(o.token_times for o in done), np.float64)
    ends = np.cumsum([len(o.token_times) for o in done], dtype=np.int64)
    within = np.ones(max(0, len(times) - 1), bool)
    # from one request's last token to the next one's first
    within[ends[(ends > 0) & (ends < len(times))] - 1] = False
    gaps: list[float] = np.diff(times)[within].tolist()
    return gaps


def _distribution(name: str, seconds: list[float]) -> dict[str, float]:
    import numpy as np

    ordered: list[float] = np.sort(np.array(seconds, np.float64)).tolist()
    mean = math.fsum(seconds) / len(seconds) if seconds else math.nan
    return {f"mean_{name}_ms": mean * 1e3} | {
        f"p{p}_{name}_ms": percentile(ordered, p) * 1e3 for p in PERCENTILES
    }


def _over(value: float, by: float) -> float:
    return value / by if by > 0 else 0.0
