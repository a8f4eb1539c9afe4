"""timeline.json: the run in the trace-event format, which https://ui.perfetto.dev and chrome://tracing
open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from headway import Engine, Observer, RequestOutput, Run, RunResult, StepColumns, hookimpl, whole

FILE = "timeline.json"
MAX_STEPS = 20_000  # the first steps of a run; with the requests below, about 10 MB at most
MAX_REQUESTS = 5_000
PIECE = 500  # steps or requests whose events are made at once
STEPS, REQUESTS = 1, 2  # the two processes of the picture


T = TypeVar("T")

#: What `_step` takes of a step, in its order.
SHOWN = (
    "step",
    "start",
    "end",
    "num_tokens",
    "num_seqs",
    "num_running",
    "num_waiting",
    "kv_used",
    "num_preempted",
)


class Timeline(Observer):
    """Steps on one track with counters below, every request on a track of its own: queued, prefill, decode.
    Steps come from the run's log."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_start(self, engine: Engine) -> None:
        self._steps: list[tuple[Any, ...]] = []

    def read(self, steps: StepColumns) -> None:
        left = MAX_STEPS - len(self._steps)
        self._steps += zip(*(steps.numbers[name][:left].tolist() for name in SHOWN), strict=True)

    def close(self, result: RunResult) -> None:
        with whole(self.directory / FILE) as scratch, scratch.open("w", encoding="utf-8") as file:
            file.write('{"traceEvents":[')
            file.write(_listed([_name(STEPS, "engine"), _name(REQUESTS, "requests")]))
            for events in self._events(result):
                if events:
                    file.write("," + _listed(events))
            file.write(f'],"displayTimeUnit":"ms","otherData":{_json(self._about(result))}}}')

    def _events(self, result: RunResult) -> Iterator[list[dict[str, Any]]]:
        """In pieces, so that what is held beside the log stays small."""
        shown: dict[str, dict[str, int]] = {}
        for piece in _pieces(self._steps):
            yield [event for step in piece for event in _step(shown, *step)]
        for outputs in _pieces(result.outputs[:MAX_REQUESTS]):
            yield [event for output in outputs for event in _request(output)]

    def _about(self, result: RunResult) -> dict[str, str]:
        cut = (
            [f"the first {MAX_STEPS:,} of {result.num_steps:,} steps"] if result.num_steps > MAX_STEPS else []
        )
        cut += (
            [f"the first {MAX_REQUESTS:,} of {len(result.outputs):,} requests"]
            if len(result.outputs) > MAX_REQUESTS
            else []
        )
        return {
            "status": result.status,
            "shown": "; ".join(cut) or "everything",
            "decision_hash": result.decision_hash,
        }


#: `json.dump` to a file and an encoder made anew for each piece are several times slower.
_json = json.JSONEncoder(separators=(",", ":")).encode


def _listed(events: list[dict[str, Any]]) -> str:
    """As they stand in a list that goes on."""
    return _json(events)[1:-1]


def _pieces(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[i : i + PIECE] for i in range(0, len(items), PIECE))


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
    counters = {
        "queue": {"running": running, "waiting": waiting},
        "KV blocks": {"used": kv_used},
        "tokens": {"step": tokens},
    }
    changed = {name: values for name, values in counters.items() if shown.get(name) != values}
    shown |= changed
    events = [
        {"ph": "C", "pid": STEPS, "name": name, "ts": at, "args": values} for name, values in changed.items()
    ]
    kind = "decode" if tokens == seqs else "mixed"
    about: dict[str, Any] = {"step": step, "tokens": tokens} | ({"preempted": preempted} if preempted else {})
    return [_span(STEPS, 0, f"{kind} {seqs}", start, end=end, **about), *events]


def _request(o: RequestOutput) -> list[dict[str, Any]]:
    started = o.first_scheduled_time if o.first_scheduled_time >= 0 else o.finish_time
    phases = [("queued", o.arrival_time, started)]
    if o.token_times:
        phases += [("prefill", started, o.token_times[0]), ("decode", o.token_times[0], o.token_times[-1])]
    elif o.first_scheduled_time >= 0:
        phases += [("prefill", started, o.finish_time)]
    about: dict[str, Any] = {
        "prompt": o.num_prompt_tokens,
        "cached": o.num_cached_tokens,
        "output": len(o.token_times),
        "state": o.state,
    }
    about |= {"preemptions": o.num_preemptions, "reason": o.finish_reason}
    title = {"ph": "M", "name": "thread_name", "pid": REQUESTS, "tid": o.index + 1, "args": {"name": o.id}}
    lasting = [phase for phase in phases if phase[2] > phase[1]]
    spans = [
        _span(REQUESTS, o.index + 1, *phase, **(about if phase is lasting[-1] else {})) for phase in lasting
    ]
    return [title, *spans]


@hookimpl
def headway_observers(run: Run) -> Sequence[Observer]:
    if run.directory is None or not run.writes(FILE):
        return []
    timeline = Timeline(run.directory)
    run.step_log.readers.append(timeline.read)
    return [timeline]
