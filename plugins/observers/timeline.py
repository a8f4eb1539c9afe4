"""timeline.json: the run in the trace-event format, which https://ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headway import Engine, Observer, RequestOutput, RunResult, StepRecord, hookimpl, whole

FILE = "timeline.json"
MAX_STEPS = 20_000  # the first steps of a run; with the requests below, about 10 MB at most
MAX_REQUESTS = 5_000
STEPS, REQUESTS = 1, 2  # the two processes of the picture


class Timeline(Observer):
    """Steps on one track with counters below, every request on a track of its own: queued, prefill, decode."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_start(self, engine: Engine) -> None:
        self._steps: list[tuple[Any, ...]] = []

    def on_step(self, r: StepRecord) -> None:
        if len(self._steps) < MAX_STEPS:
            plan = r.plan
            self._steps.append(
                (r.step, r.start, r.end, plan.num_tokens, len(plan.requests), r.num_running, r.num_waiting, r.kv_used, r.num_preempted)
            )

    def close(self, result: RunResult) -> None:
        events = [_name(STEPS, "engine"), _name(REQUESTS, "requests")]
        shown: dict[str, dict[str, int]] = {}
        for step in self._steps:
            events += _step(shown, *step)
        for output in result.outputs[:MAX_REQUESTS]:
            events += _request(output)
        cut = [f"the first {MAX_STEPS:,} of {result.num_steps:,} steps"] if result.num_steps > MAX_STEPS else []
        cut += [f"the first {MAX_REQUESTS:,} of {len(result.outputs):,} requests"] if len(result.outputs) > MAX_REQUESTS else []
        other = {"status": result.status, "shown": "; ".join(cut) or "everything", "decision_hash": result.decision_hash}
        with whole(self.directory / FILE) as scratch, scratch.open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}, file, separators=(",", ":"))


def _name(pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}


def _span(pid: int, tid: int, name: str, start: float, end: float, **about: Any) -> dict[str, Any]:
    """Seconds become microseconds, the format's unit."""
    ts, dur = round(start * 1e6, 3), round((end - start) * 1e6, 3)
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": about}


def _step(
    shown: dict[str, dict[str, int]],
    step: int,
    start: float,
    end: float,
    tokens: int,
    seqs: int,
    running: int,
    waiting: int,
    kv_used: int,
    preempted: int,
) -> list[dict[str, Any]]:
    """A span, and the counters that differ from what is `shown`: a viewer draws each until its next event."""
    at = round(end * 1e6, 3)
    counters = {"queue": {"running": running, "waiting": waiting}, "KV blocks": {"used": kv_used}, "tokens": {"step": tokens}}
    changed = {name: values for name, values in counters.items() if shown.get(name) != values}
    shown |= changed
    events = [{"ph": "C", "pid": STEPS, "name": name, "ts": at, "args": values} for name, values in changed.items()]
    kind = "decode" if tokens == seqs else "mixed"
    about = {"step": step, "tokens": tokens} | ({"preempted": preempted} if preempted else {})
    return [_span(STEPS, 0, f"{kind} {seqs}", start, end, **about), *events]


def _request(o: RequestOutput) -> list[dict[str, Any]]:
    started = o.first_scheduled_time if o.first_scheduled_time >= 0 else o.finish_time
    phases = [("queued", o.arrival_time, started)]
    if o.token_times:
        phases += [("prefill", started, o.token_times[0]), ("decode", o.token_times[0], o.token_times[-1])]
    elif o.first_scheduled_time >= 0:
        phases += [("prefill", started, o.finish_time)]
    about = {"prompt": o.num_prompt_tokens, "cached": o.num_cached_tokens, "output": len(o.token_times), "state": o.state}
    about |= {"preemptions": o.num_preemptions, "reason": o.finish_reason}
    title = {"ph": "M", "name": "thread_name", "pid": REQUESTS, "tid": o.index + 1, "args": {"name": o.id}}
    lasting = [phase for phase in phases if phase[2] > phase[1]]
    spans = [_span(REQUESTS, o.index + 1, *phase, **(about if phase is lasting[-1] else {})) for phase in lasting]
    return [title, *spans]


@hookimpl
def headway_observers(run):
    return [Timeline(run.directory)] if run.writes(FILE) else []
