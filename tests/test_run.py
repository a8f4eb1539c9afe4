"""`python run.py` from the outside: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
SIM = ("executor=sim", "tracking=none", "workload.num_requests=8")

MISBEHAVING = """
from dataclasses import dataclass
from headway import Order, Workload, Arrival, SamplingParams, hookimpl

@dataclass
class Raises(Order):
    '''Raises after a while.'''
    after: int = 3
    def order(self, view):
        if view.step >= self.after:
            raise ZeroDivisionError("planted")
        return view.waiting

@dataclass
class Interrupts(Workload):
    '''Ctrl-C while requests still arrive.'''
    def arrivals(self, seed, vocab_size, max_model_len):
        for i in range(6):
            yield Arrival(i * 0.001, [1, 2, 3], SamplingParams(max_tokens=4), output_len=4)
        raise KeyboardInterrupt

@hookimpl
def headway_register(registry):
    registry.add("order", "raises", Raises)
    registry.add("workload", "interrupts", Interrupts)
"""


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A folder that holds an installed package with plugins that misbehave."""
    folder = tmp_path / "site"
    info = folder / "strangers-0.1.dist-info"
    info.mkdir(parents=True)
    (folder / "strangers.py").write_text(MISBEHAVING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[headway]\nstrangers = strangers\n")
    return folder


def run(folder: Path, *arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, COLUMNS="200", **environment)
    if path:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def only(folder: Path, kind: str = "outputs") -> Path:
    """The directory of the one run in a folder."""
    (found,) = [p.parent for p in folder.glob(f"{kind}/**/result.json")]
    return found


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_prints_what_it_composed_and_one_table_and_writes_its_directory(tmp_path):
    ended = run(tmp_path, *SIM, "cache=radix")
    assert ended.returncode == 0, ended.stderr
    for line in ("scheduler", "radix", "8 of 8 finished", "TTFT ms", "prefix hits", "policy time", "results: "):
        assert line in ended.stdout
    directory = only(tmp_path)
    names = {
        "config.yaml",
        "requests.parquet",
        "steps.parquet",
        "decisions.parquet",
        "summary.json",
        "result.json",
        "timeline.json",
        "versions.json",
        "replay.npz",
    }
    assert names <= {p.name for p in directory.iterdir()}
    summary, result = read(directory / "summary.json"), read(directory / "result.json")
    assert result["status"] == "finished" and result["summary"] == summary
    assert result["overrides"] == [*SIM, "cache=radix"]
    requests, steps = pq.read_table(directory / "requests.parquet").to_pylist(), pq.read_table(directory / "steps.parquet").to_pylist()
    assert len(requests) == summary["num_requests"] == 8
    assert sum(len(r["token_times"]) for r in requests) == sum(s["emitted"] for s in steps) == summary["total_output_tokens"]
    assert sum(r["ttft"] for r in requests) / 8 * 1e3 == pytest.approx(summary["mean_ttft_ms"])
    decisions = pq.read_table(directory / "decisions.parquet").to_pylist()
    assert len(decisions) == len(steps) == summary["num_steps"]
    assert sum(sum(d["lengths"]) for d in decisions) == summary["planned_tokens"]
    versions = read(directory / "versions.json")
    assert versions["python"] and versions["packages"]["hydra-core"]


def test_the_same_seed_takes_the_same_decisions_in_every_process(tmp_path):
    hashes = []
    for n, hashseed in enumerate(("1", "2")):
        (folder := tmp_path / str(n)).mkdir()
        assert run(folder, *SIM, "seed=5", "workload=shared_prefix", PYTHONHASHSEED=hashseed).returncode == 0
        hashes.append(read(only(folder) / "summary.json")["decision_hash"])
    assert hashes[0] == hashes[1]


def test_a_runs_saved_config_runs_it_again(tmp_path):
    (first := tmp_path / "first").mkdir()
    (again := tmp_path / "again").mkdir()
    assert run(first, *SIM, "seed=3", "scheduler=pd_split").returncode == 0
    ended = run(again, "-cp", str(only(first) / ".hydra"), "-cn", "config")
    assert ended.returncode == 0, ended.stderr
    assert read(only(again) / "summary.json")["decision_hash"] == read(only(first) / "summary.json")["decision_hash"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedulr=fcfs"], "error: schedulr: there is no such key. Did you mean scheduler"),
        (["scheduler.token_budget=abc"], "error: scheduler.token_budget=abc: expected a whole number or null"),
        (["engine.block_size=0"], "error: engine.block_size=0: expected at least 1"),
        (["executor=oracle", "parallel.tp=4"], "error: parallel.tp=4 parallel.pp=1: executor=oracle runs on one rank"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path, arguments, message):
    ended = run(tmp_path, *SIM, *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_plugin_that_raises_ends_the_run_with_its_name_and_what_was_done(tmp_path, strangers):
    ended = run(tmp_path, *SIM, "workload.arrival=all_at_once", "order=raises", "order.after=3", path=strangers)
    assert ended.returncode == 1
    assert "plugin order=raises, step 3: raised ZeroDivisionError: planted" in ended.stderr
    assert "Traceback" not in ended.stderr
    directory = only(tmp_path)
    result = read(directory / "result.json")
    assert result["status"] == "failed" and "planted" in result["error"] and "ZeroDivisionError" in result["traceback"]
    assert result["summary"]["num_steps"] == 3 and result["summary"]["aborted"] == 8
    assert pq.read_table(directory / "steps.parquet").num_rows == 3


def test_the_traceback_is_shown_to_those_who_ask(tmp_path, strangers):
    ended = run(tmp_path, *SIM, "order=raises", path=strangers, HEADWAY_TRACEBACK="1")
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "strangers.py" in ended.stderr


def test_ctrl_c_keeps_what_was_done_and_marks_it(tmp_path, strangers):
    ended = run(tmp_path, "executor=sim", "tracking=none", "workload=interrupts", path=strangers)
    assert ended.returncode == 130
    directory = only(tmp_path)
    assert read(directory / "result.json")["status"] == "interrupted"
    assert 0 < read(directory / "summary.json")["num_requests"] == pq.read_table(directory / "requests.parquet").num_rows


def test_a_sweep_ends_with_one_table_also_when_a_run_failed(tmp_path, strangers):
    ended = run(tmp_path, "-m", *SIM, "scheduler=fcfs,chunked", "order=fcfs,raises", "hydra.sweep.dir=sweep", path=strangers)
    assert ended.returncode == 1
    last = ended.stdout[ended.stdout.rindex("  job  ") :].splitlines()
    assert last[0].split()[:3] == ["job", "scheduler", "order"]
    assert [line.split()[-1] for line in last[2:6]] == ["finished", "failed", "finished", "failed"]
    assert any("planted" in line for line in last[6:])
    rows = read(tmp_path / "sweep" / "comparison.json")
    assert [(r["scheduler"], r["order"], r["status"]) for r in rows][:2] == [("fcfs", "fcfs", "finished"), ("fcfs", "raises", "failed")]
    assert len((tmp_path / "sweep" / "comparison.csv").read_text().splitlines()) == 5
    assert (tmp_path / "sweep" / "comparison.md").read_text().startswith("| job")


def test_a_sweep_started_again_in_its_folder_runs_only_what_is_missing(tmp_path):
    arguments = ("-m", *SIM, "seed=1,2", "hydra.sweep.dir=sweep")
    assert run(tmp_path, *arguments).returncode == 0
    (tmp_path / "sweep" / "1" / "result.json").unlink()
    before = (tmp_path / "sweep" / "0" / "result.json").stat().st_mtime_ns
    again = run(tmp_path, *arguments)
    assert again.returncode == 0 and "sweep/0: finished already" in again.stdout
    assert (tmp_path / "sweep" / "0" / "result.json").stat().st_mtime_ns == before
    assert (tmp_path / "sweep" / "1" / "result.json").exists()


def test_an_interrupted_sweep_stops_and_still_compares(tmp_path, strangers):
    ended = run(tmp_path, "-m", "executor=sim", "tracking=none", "workload=random,interrupts,random", "hydra.sweep.dir=sweep", path=strangers)
    assert ended.returncode == 130
    assert [r["status"] for r in read(tmp_path / "sweep" / "comparison.json")] == ["finished", "interrupted"]


def test_help_shows_the_examples_and_an_installed_plugin_with_its_parameters(tmp_path, strangers):
    shown = run(tmp_path, "--help", path=strangers).stdout
    assert "scheduler=chunked cache=radix parallel.tp=4" in shown
    assert "raises           Raises after a while." in shown and "order.after=3" in shown
    wrong = run(tmp_path, "--help", "ordr")
    assert wrong.returncode == 2 and "error: --help ordr: there is no such group or option. Did you mean order" in wrong.stderr
