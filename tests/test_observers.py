"""The always-on observers: what they write, that it stays bounded, and what they print where there is no
terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from core.compose.build import Composition, Run, build
from core.compose.defaults import default_choices
from core.compose.hooks import Registry, load_registry
from core.measure import step_log
from headway import EngineConfig, Observer
from plugins.observers import timeline
from plugins.observers.progress import Progress

CHOICES = {
    **default_choices(scheduler=("chunked", {"token_budget": 32})),
    "executor": ("oracle", {"vocab_size": 512, "max_model_len": 256}),
    "workload": ("random", {"num_requests": 20, "input_len": 24, "output_len": 12}),
}  # fmt: skip


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def watched(registry: Registry, directory: Path | None, *observers: Observer, num_blocks: int = 12) -> Run:
    """A run in a pool so small that requests are preempted."""
    composition = Composition(CHOICES, engine=EngineConfig(block_size=4, num_blocks=num_blocks))
    return build(registry, composition, observers, directory=directory)


def test_the_timeline_holds_every_step_and_every_phase_in_microseconds(registry, tmp_path):
    result = watched(registry, tmp_path).execute()
    trace = json.loads((tmp_path / "timeline.json").read_text())
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    steps = [e for e in spans if e["pid"] == timeline.STEPS]
    assert len(steps) == result.num_steps
    assert sum(e["dur"] for e in steps) / 1e6 == pytest.approx(result.busy_time)
    phases = [e for e in spans if e["pid"] == timeline.REQUESTS and e["name"] == "decode"]
    assert len(phases) == 20
    first = result.outputs[0]
    assert phases[0]["ts"] / 1e6 == pytest.approx(first.token_times[0])
    assert (phases[0]["ts"] + phases[0]["dur"]) / 1e6 == pytest.approx(first.finish_time)
    assert {e["name"] for e in trace["traceEvents"] if e["ph"] == "C"} == {"queue", "KV blocks", "tokens"}


def test_the_timeline_is_bounded_and_says_what_it_left_out(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "MAX_STEPS", 5)
    monkeypatch.setattr(timeline, "MAX_REQUESTS", 3)
    result = watched(registry, tmp_path).execute()
    trace = json.loads((tmp_path / "timeline.json").read_text())
    assert sum(e["ph"] == "X" and e["pid"] == timeline.STEPS for e in trace["traceEvents"]) == 5
    assert (
        f"the first 5 of {result.num_steps} steps; the first 3 of 20 requests" == trace["otherData"]["shown"]
    )


def test_tables_written_in_pieces_hold_every_row_once(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(step_log, "MOST_STEPS", 7)
    run = watched(registry, tmp_path)
    result = run.execute()
    steps = pq.read_table(tmp_path / "steps.parquet").to_pydict()
    assert steps["step"] == list(range(result.num_steps))
    assert sum(steps["num_preempted"]) == result.num_preemptions > 0
    assert max(steps["kv_used"]) <= result.kv_total
    requests = pq.read_table(tmp_path / "requests.parquet").to_pylist()
    assert [r["output_token_ids"] for r in requests] == [o.output_token_ids for o in result.outputs]
    assert sum(r["num_recomputed_tokens"] for r in requests) > 0


def test_decisions_are_the_plans(registry, tmp_path):
    plans = []

    class Plans(Observer):
        def on_step(self, record):
            plans.append(
                ([r.index for r in record.plan.requests], list(record.plan.starts), list(record.plan.lengths))
            )

    watched(registry, tmp_path, Plans()).execute()
    rows = pq.read_table(tmp_path / "decisions.parquet").to_pylist()
    assert [(r["requests"], r["starts"], r["lengths"]) for r in rows] == plans


def test_a_run_without_a_directory_writes_and_prints_nothing(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = watched(registry, None)
    assert run.engine.observers == []
    run.execute()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_progress_prints_plain_lines_where_there_is_no_terminal(registry, capsys):
    progress = Progress(total=20)
    progress.interval = 0.0  # a line a step
    result = watched(registry, None, progress).execute()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == result.num_steps
    assert lines[0].startswith("0/20 requests") and "KV 67%" in lines[0]
    assert "running" in lines[0] and "waiting" in lines[0] and "tok/s" in lines[0]
