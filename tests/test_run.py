"""`python run.py` from the outside: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from core.cli.arguments import arguments
from core.cli.folders import Lock
from core.errors import ConfigError
from core.measure import results

ROOT = Path(__file__).resolve().parent.parent
SIM = ("executor=sim", "tracking=none", "workload.num_requests=8")

MISBEHAVING = """
import signal, sys, time
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

@dataclass
class Quits(Order):
    '''Calls sys.exit(0) at some moment.'''
    moment: str = "order"
    def setup(self, ctx):
        super().setup(ctx)
        self.quit("setup")
    def order(self, view):
        self.quit("order")
        return view.waiting
    def quit(self, moment):
        if self.moment == moment:
            sys.exit(0)

@dataclass
class Signalled(Order):
    '''Gets signals in the middle of a step, which then comes back or does not.'''
    signals: str = "SIGTERM"
    hangs: bool = False
    def order(self, view):
        if view.step == 3:
            for name in self.signals.split("+"):
                signal.raise_signal(signal.Signals[name])
            if self.hangs:
                time.sleep(60)
        return view.waiting

@dataclass
class Blocks(Order):
    '''Sees to it that a file of the run cannot be written.'''
    file: str = ""
    def order(self, view):
        return view.waiting

@hookimpl
def headway_run_start(run):
    if file := getattr(run.roles["order"], "file", ""):
        (run.directory / file).mkdir()

@hookimpl
def headway_register(registry):
    registry.add("order", "raises", Raises)
    registry.add("order", "quits", Quits)
    registry.add("order", "signalled", Signalled)
    registry.add("order", "blocks", Blocks)
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


def run(
    folder: Path, *arguments: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, COLUMNS="200", **environment)
    if path:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
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
    for line in (
        "scheduler",
        "radix",
        "8 of 8 finished",
        "TTFT ms",
        "prefix hits",
        "policy time",
        "results: ",
    ):
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
    requests, steps = (
        pq.read_table(directory / "requests.parquet").to_pylist(),
        pq.read_table(directory / "steps.parquet").to_pylist(),
    )
    assert len(requests) == summary["num_requests"] == 8
    assert (
        sum(len(r["token_times"]) for r in requests)
        == sum(s["emitted"] for s in steps)
        == summary["total_output_tokens"]
    )
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
    assert (
        read(only(again) / "summary.json")["decision_hash"]
        == read(only(first) / "summary.json")["decision_hash"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedulr=fcfs"], "error: schedulr: there is no such key. Did you mean scheduler"),
        (
            ["scheduler.token_budget=abc"],
            "error: scheduler.token_budget=abc: expected a whole number or null",
        ),
        (["engine.block_size=0"], "error: engine.block_size=0: expected at least 1"),
        (
            ["executor=oracle", "parallel.tp=4"],
            "error: parallel.tp=4 parallel.pp=1: executor=oracle runs on one rank",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path, arguments, message):
    ended = run(tmp_path, *SIM, *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_plugin_that_raises_ends_the_run_with_its_name_and_what_was_done(tmp_path, strangers):
    ended = run(
        tmp_path, *SIM, "workload.arrival=all_at_once", "order=raises", "order.after=3", path=strangers
    )
    assert ended.returncode == 1
    assert "plugin order=raises, step 3: raised ZeroDivisionError: planted" in ended.stderr
    assert "Traceback" not in ended.stderr
    directory = only(tmp_path)
    result = read(directory / "result.json")
    assert (
        result["status"] == "failed"
        and "planted" in result["error"]
        and "ZeroDivisionError" in result["traceback"]
    )
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
    assert (
        0
        < read(directory / "summary.json")["num_requests"]
        == pq.read_table(directory / "requests.parquet").num_rows
    )


def test_a_sweep_ends_with_one_table_also_when_a_run_failed(tmp_path, strangers):
    ended = run(
        tmp_path,
        "-m",
        *SIM,
        "scheduler=fcfs,chunked",
        "order=fcfs,raises",
        "hydra.sweep.dir=sweep",
        path=strangers,
    )
    assert ended.returncode == 1
    last = ended.stdout[ended.stdout.rindex("  job  ") :].splitlines()
    assert last[0].split()[:3] == ["job", "scheduler", "order"]
    assert [line.split()[-1] for line in last[2:6]] == ["finished", "failed", "finished", "failed"]
    assert any("planted" in line for line in last[6:])
    rows = read(tmp_path / "sweep" / "comparison.json")
    assert [(r["scheduler"], r["order"], r["status"]) for r in rows][:2] == [
        ("fcfs", "fcfs", "finished"),
        ("fcfs", "raises", "failed"),
    ]
    assert len((tmp_path / "sweep" / "comparison.csv").read_text().splitlines()) == 5
    assert (tmp_path / "sweep" / "comparison.md").read_text().startswith("| job")


# ---- whose folder it is ----------------------------------------------------------------------------------


def test_a_sweep_started_again_runs_what_is_missing_whatever_its_order_and_overwrites_no_other_job(tmp_path):
    def seeds() -> dict[str, int]:
        return {p.parent.name: read(p)["seed"] for p in sorted(tmp_path.glob("sweep/*/result.json"))}

    assert run(tmp_path, "-m", *SIM, "seed=1,2,3", "hydra.sweep.dir=sweep").returncode == 0
    assert seeds() == {"0": 1, "1": 2, "2": 3}
    sweep = tmp_path / "sweep"
    before = (sweep / "0" / "result.json").stat().st_mtime_ns
    (sweep / "1" / "result.json").write_text('{"status": "fini')
    (sweep / "2" / "summary.json").write_text("")
    again = run(tmp_path, "-m", *SIM, "seed=4,3,2,1", "hydra.sweep.dir=sweep")
    assert again.returncode == 0 and seeds() == {"0": 1, "1": 2, "2": 3, "3": 4}
    assert (
        "sweep/0: finished already" in again.stdout
        and (sweep / "0" / "result.json").stat().st_mtime_ns == before
    )
    assert (
        "sweep/1/result.json: cannot be read" in again.stderr
        and "sweep/2/summary.json: cannot be read" in again.stderr
    )
    assert [row["seed"] for row in read(sweep / "comparison.json")] == ["1", "2", "3", "4"]


def test_two_commands_that_choose_the_same_name_get_a_folder_each(tmp_path):
    same = "${headway.folder:multirun/same}"
    command = [sys.executable, str(ROOT / "run.py"), "-m", *SIM, f"hydra.sweep.dir={same}"]
    both = [
        subprocess.Popen([*command, seeds], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for seeds in ("seed=1,2", "seed=3,4")
    ]
    tables = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    written = [
        sorted(read(p)["seed"] for p in (tmp_path / "multirun" / name).glob("*/result.json"))
        for name in ("same", "same-2")
    ]
    assert sorted(written) == [[1, 2], [3, 4]]
    for seeds, table in zip(([1, 2], [3, 4]), tables, strict=True):
        assert ("multirun/same-2/" in table) == (written[1] == seeds)


@pytest.mark.parametrize(
    "where", [("-m", "hydra.sweep.dir=mine"), ("hydra.run.dir=mine",)], ids=["sweep", "run"]
)
def test_a_folder_that_another_process_writes_into_is_refused(tmp_path, where):
    (tmp_path / "mine").mkdir()
    with Lock(tmp_path / "mine"):
        ended = run(tmp_path, *SIM, *where)
        assert [p.name for p in (tmp_path / "mine").iterdir()] == [".headway.lock"]
    assert (
        ended.returncode == 2
        and f"process {os.getpid()} on " in ended.stderr
        and "writes into this folder now" in ended.stderr
    )


def test_a_failing_run_in_an_old_folder_leaves_no_file_of_the_old_run_and_all_of_the_users(tmp_path):
    old = [*results.FILES, results.RESULT, results.CONFIG, "steps.parquet.part"]
    (tmp_path / "mine").mkdir()
    for name in [*old, "notes.txt", "plot.json"]:
        (tmp_path / "mine" / name).write_text("old")
    assert run(tmp_path, *SIM, "engine.block_size=0", "hydra.run.dir=mine").returncode == 2
    left = {p.name: p for p in (tmp_path / "mine").iterdir()}
    assert set(left) == {".hydra", "config.yaml", "result.json", "versions.json", "notes.txt", "plot.json"}
    assert [name for name in sorted(left) if left[name].is_file() and left[name].read_text() == "old"] == [
        "notes.txt",
        "plot.json",
    ]
    assert read(left["result.json"])["status"] == "failed"


# ---- how a run ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signals", "hangs", "code"),
    [
        ("SIGTERM", "false", 143),
        ("SIGHUP", "false", 129),
        ("SIGINT+SIGINT", "false", 130),
        ("SIGTERM", "true", 143),
    ],
    ids=["SIGTERM", "SIGHUP", "Ctrl-C twice", "in a step that never comes back"],
)
def test_a_signal_keeps_what_was_done_and_stops_the_sweep(tmp_path, strangers, signals, hangs, code):
    order = ("workload=random", "order=signalled", f"order.signals='{signals}'", f"order.hangs={hangs}")
    ended = run(tmp_path, "-m", *SIM, *order, "seed=1,2", "hydra.sweep.dir=sweep", path=strangers)
    assert ended.returncode == code, ended.stderr
    (job,) = read(tmp_path / "sweep" / "comparison.json")
    assert (job["job"], job["status"], job["error"]) == ("0", "interrupted", "") and job["num_steps"] >= 3
    assert (
        job["completed"] + job["aborted"]
        == job["num_requests"]
        == pq.read_table(tmp_path / "sweep/0/requests.parquet").num_rows
        == 8
    )


def test_a_policy_that_calls_exit_ends_its_own_job_with_its_name(tmp_path, strangers):
    ended = run(
        tmp_path,
        "-m",
        *SIM,
        "order=quits",
        "order.moment=setup,order,never",
        "hydra.sweep.dir=sweep",
        path=strangers,
    )
    assert ended.returncode == 2  # one of them was refused before its first step
    rows = read(tmp_path / "sweep" / "comparison.json")
    assert [row["status"] for row in rows] == ["failed", "failed", "finished"]
    assert all("order=quits" in row["error"] and "exit" in row["error"].lower() for row in rows[:2])


def test_a_file_that_cannot_be_written_costs_neither_the_numbers_nor_the_sweep(tmp_path, strangers):
    ended = run(
        tmp_path,
        "-m",
        *SIM,
        "order=blocks",
        "order.file=steps.parquet,summary.json,''",
        "hydra.sweep.dir=sweep",
        path=strangers,
    )
    assert ended.returncode == 1
    jobs = [read(tmp_path / "sweep" / name / "result.json") for name in "012"]
    assert [job["status"] for job in jobs] == ["failed", "failed", "finished"]
    assert all(
        name in job["error"] and job["summary"]["completed"] == 8
        for name, job in zip(("steps.parquet", "summary.json"), jobs, strict=False)
    )
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_whose_requests_were_all_rejected_is_no_success(tmp_path):
    ended = run(tmp_path, *SIM, "workload=random", "workload.input_len=5000")
    assert (
        ended.returncode == 1
        and "all 8 requests were rejected" in ended.stderr
        and "does not fit the context" in ended.stderr
    )
    assert read(only(tmp_path) / "result.json")["status"] == "failed"


def test_an_interrupted_sweep_stops_and_still_compares(tmp_path, strangers):
    ended = run(
        tmp_path,
        "-m",
        "executor=sim",
        "tracking=none",
        "workload=random,interrupts,random",
        "hydra.sweep.dir=sweep",
        path=strangers,
    )
    assert ended.returncode == 130
    assert [r["status"] for r in read(tmp_path / "sweep" / "comparison.json")] == ["finished", "interrupted"]


def test_help_shows_the_examples_and_an_installed_plugin_with_its_parameters(tmp_path, strangers):
    shown = run(tmp_path, "--help", path=strangers).stdout
    assert "scheduler=chunked cache=radix parallel.tp=4" in shown
    assert "raises           Raises after a while." in shown and "order.after=3" in shown
    wrong = run(tmp_path, "--help", "ordr")
    assert (
        wrong.returncode == 2
        and "error: --help ordr: there is no such group or option. Did you mean order" in wrong.stderr
    )


# ---- what is stored, and what is read back ---------------------------------------------------------------


def test_what_comes_from_the_environment_is_neither_stored_nor_sent_nor_printed(tmp_path):
    given = (
        "executor=sim",
        "workload.num_requests=8",
        "tracking.mode=offline",
        "model.name_or_path=${oc.env:PLANTED}",
    )
    ended = run(tmp_path, *given, PLANTED="sesame-open-4711")
    assert ended.returncode == 0, ended.stderr
    directory = only(tmp_path)
    assert list(directory.glob("wandb/*/*.wandb"))
    with zipfile.ZipFile(directory / "replay.npz") as record:
        inside = {name: record.read(name) for name in record.namelist()}
    assert b"".join(inside["meta.npy"].split(b"\0")).count(b"${oc.env:PLANTED}") == 1
    files = inside | {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    spread = "sesame-open-4711".encode("utf-32-le")  # as numpy holds texts
    assert [
        name for name, content in files.items() if b"sesame-open-4711" in content or spread in content
    ] == []
    assert "sesame" not in ended.stdout + ended.stderr
    assert "name_or_path: ${oc.env:PLANTED}" in (directory / "config.yaml").read_text()


PLANTED = """
hydra:
  job_logging:
    version: 1
    root: {{handlers: [f, g]}}
    handlers: {{f: {{class: logging.FileHandler, filename: {marker}1}}, g: {{(): {code}}}}}
  hydra_logging:
    version: 1
    root: {{handlers: [f]}}
    handlers: {{f: {{class: logging.FileHandler, filename: {marker}2}}}}
  callbacks: {{c: {{_target_: pathlib.Path.touch, self: {{_target_: pathlib.Path, _args_: [{marker}3]}}}}}}
  launcher: {{_target_: pathlib.Path, _args_: [{marker}4]}}
  sweeper: {{_target_: pathlib.Path, _args_: [{marker}5]}}
  run: {{dir: {marker}6}}
  sweep: {{dir: {marker}7}}
  job: {{env_set: {{HEADWAY_PLANTED: here}}, chdir: true}}
"""


def test_the_config_of_a_strangers_run_is_data(tmp_path):
    assert run(tmp_path, *SIM, "hydra.run.dir=theirs").returncode == 0
    config = tmp_path / "theirs" / ".hydra" / "config.yaml"
    marker = tmp_path / "planted"
    code = "pathlib.Path.touch"
    with config.open("a") as file:
        file.write(PLANTED.format(marker=marker, code=code))
    ended = run(tmp_path, "-cp", "theirs/.hydra", "-cn", "config", "-m", "seed=1,2", "hydra.sweep.dir=mine")
    assert ended.returncode == 0, ended.stderr
    assert "config.yaml: `hydra` is ignored" in ended.stderr
    assert not list(tmp_path.glob("planted*"))
    assert sorted(p.name for p in (tmp_path / "mine").iterdir() if p.is_dir()) == ["0", "1"]


def test_a_mistake_beside_a_saved_config_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    ended = run(tmp_path, "-cp", str(tmp_path), "-cn", "config", "schedulr=fcfs")
    assert ended.returncode == 2
    assert [line.partition(". ")[0] for line in ended.stderr.splitlines()] == [
        "error: schedulr: there is no such key"
    ]


def test_the_files_of_a_run_can_be_chosen(tmp_path):
    assert run(tmp_path, *SIM, "results.files=[requests.parquet]").returncode == 0
    assert {p.name for p in only(tmp_path).iterdir()} == {
        ".hydra",
        "config.yaml",
        "result.json",
        "requests.parquet",
    }


def test_a_run_can_leave_its_summary_alone_and_its_files_can_still_be_named(tmp_path):
    always = {".hydra", "config.yaml", "result.json"}
    assert run(tmp_path, *SIM, "results=summary").returncode == 0
    assert {p.name for p in only(tmp_path).iterdir()} == {*always, "summary.json", "versions.json"}
    again = run(tmp_path, *SIM, "results=summary", "results.files=[steps.parquet]", "hydra.run.dir=named")
    assert again.returncode == 0, again.stderr
    assert {p.name for p in (tmp_path / "named").iterdir()} == {*always, "steps.parquet"}


def test_all_files_are_the_default_and_can_be_asked_for(tmp_path):
    for options in ([], ["results=all"]):
        folder = f"run{len(options)}"
        assert run(tmp_path, *SIM, *options, f"hydra.run.dir={folder}").returncode == 0
        assert {p.name for p in (tmp_path / folder).iterdir()} == {
            *results.FILES,
            results.RESULT,
            results.CONFIG,
            ".hydra",
        }


FOREIGN_GROUPS = {
    "callbacks": (
        "experiment/mine.yaml",
        "# @package _global_\nhydra: {callbacks: {c: {_target_: os.getcwd}}}\n",
    ),
    "job_logging": ("experiment/mine.yaml", "# @package _global_\nhydra: {job_logging: {version: 1}}\n"),
    "a package": ("experiment/mine.yaml", "# @package hydra.callbacks.c\n_target_: os.getcwd\n"),
    "defaults": ("experiment/mine.yaml", "defaults: [override /hydra/launcher: mine]\n"),
    "a group": ("hydra/launcher/mine.yaml", "_target_: os.getcwd\n"),
    "a sweep over hydra": (
        "experiment/mine.yaml",
        "hydra: {sweeper: {params: {+hydra.callbacks.c: '{_target_: os.getcwd}'}}}\n",
    ),
    "a sweeper": ("experiment/mine.yaml", "hydra: {sweeper: {_target_: os.getcwd, params: {seed: '1,2'}}}\n"),
}


@pytest.mark.parametrize(("file", "text"), FOREIGN_GROUPS.values(), ids=FOREIGN_GROUPS.keys())
def test_groups_from_elsewhere_say_nothing_of_how_hydra_launches(tmp_path, file, text):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml: .*not how Hydra launches it"):
        arguments(["-cd", str(tmp_path), "+experiment=mine"], ROOT / "conf")


def test_groups_from_elsewhere_may_be_a_sweep(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\norder: {name: fcfs}\n"
    )
    given = ["-cd", str(tmp_path), "+experiment=mine"]
    assert arguments(given, ROOT / "conf") == (given, None)
