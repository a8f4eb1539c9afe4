"""What a run leaves behind when something goes wrong: every fault, at every moment, in every layout, with a
verdict.

    python -m tests.helpers.faults                      the whole matrix, some minutes
    python -m tests.helpers.faults tp=2 SIGKILL         only the rows that contain all of these words

A fault is brought in by an installed package that acts on itself at a moment of the run, so nothing here
depends on timing. tests/test_faults.py runs a small part of the matrix; docs/reliability.md says what it
stands for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GONE = 20.0  # seconds in which every process of a run that ends must be gone
REQUESTS = 6

PLANTED = r'''
"""Brings a fault into the process that imports it: HEADWAY_FAULT at HEADWAY_MOMENT."""
import os, resource, signal, subprocess, sys
from pathlib import Path
from headway import Observer, hookimpl

FAULT, MOMENT, STEP = os.environ["HEADWAY_FAULT"], os.environ["HEADWAY_MOMENT"], 10
DRIVER = "HEADWAY_RANK" not in os.environ
acted = again = False

def ranks():
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]

def reach(moment):
    global acted, again
    if acted or not DRIVER or moment != MOMENT:
        return
    acted = True
    print(f"fault: {FAULT} at {moment}", flush=True)
    if FAULT == "raise":
        raise ZeroDivisionError("planted")
    if FAULT == "exit":
        sys.exit(0)
    if FAULT == "disk full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        room = 0 if moment == "writing" else 4096  # bytes per file: enough for result.json, or for nothing
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    elif FAULT == "rank killed":
        os.kill(ranks()[0], signal.SIGKILL)
    elif FAULT == "rank stopped":
        os.kill(ranks()[0], signal.SIGSTOP)
    elif FAULT == "SIGINT twice":
        again = True  # and the second time while what was done is written
        signal.raise_signal(signal.SIGINT)
    else:
        os.kill(os.getpid(), signal.Signals[FAULT])

class Popen(subprocess.Popen):
    """A rank was started and has not connected yet."""
    def __init__(self, command, *args, **options):
        super().__init__(command, *args, **options)
        if any("plugins.parallel" in str(word) for word in command):
            reach("connecting")

subprocess.Popen = Popen

class Watch(Observer):
    plugin_name = "planted"
    def on_step(self, record):
        if record.step == STEP:
            reach("running")
    def close(self, result):
        global again
        if again:
            again = False
            signal.raise_signal(signal.SIGINT)

reach("importing")

@hookimpl
def headway_observers(run):
    return [Watch()]

@hookimpl
def headway_run_start(run):
    reach("starting")

@hookimpl
def headway_run_end(run, result):
    reach("writing")
'''

LAYOUTS = {
    "simulated": ("executor=sim", "model=tiny"),
    "one rank": (),
    "tp=2": ("parallel.tp=2", "parallel.timeout=4"),
    "pp=2": ("parallel.pp=2", "parallel.timeout=4"),
    "sweep": ("-m", "executor=sim", "model=tiny", "order=fcfs,sjf", "predictor=oracle"),
}
SIGNALS = ("SIGINT", "SIGINT twice", "SIGTERM", "SIGHUP", "SIGKILL")
MOMENTS = ("importing", "connecting", "starting", "running", "writing")
RANK_FAULTS = ("rank killed", "rank stopped")
FAULTS = (*SIGNALS, *RANK_FAULTS, "raise", "exit", "disk full")


@dataclass(frozen=True)
class Case:
    fault: str
    moment: str
    layout: str

    def __str__(self) -> str:
        return f"{self.fault}, {self.moment}, {self.layout}"

    @property
    def happens(self) -> bool:
        """Whether this layout has this moment, and this moment something that can fail so."""
        ranks = self.layout in ("tp=2", "pp=2")
        if self.moment == "connecting" and (not ranks or self.fault in ("raise", "exit")):
            return False
        if self.fault in RANK_FAULTS:
            return ranks and self.moment in ("connecting", "starting", "running")
        if self.fault in ("raise", "exit"):
            # a package that cannot be imported is left out and listed as broken
            return self.moment != "importing"
        return not (self.fault == "disk full" and self.moment in ("importing", "connecting"))


MATRIX = [
    case
    for layout in LAYOUTS
    for fault in FAULTS
    for moment in MOMENTS
    if (case := Case(fault, moment, layout)).happens
]


@dataclass(frozen=True)
class Outcome:
    """What a case left behind."""

    code: int
    printed: str
    # per folder of a job, in the order of jobs: its result.json; None where it is not JSON
    results: list[dict | None]
    unfinished: list[str]  # scratch files that were left
    outlived: list[int]  # processes still there after GONE seconds
    seconds: float


def run(case: Case, folder: Path) -> Outcome:
    site = folder / "site"
    info = site / "planted-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "planted.py").write_text(PLANTED)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[headway]\nplanted = planted\n")
    where = "hydra.sweep.dir" if case.layout == "sweep" else "hydra.run.dir"
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        *LAYOUTS[case.layout],
        "tracking=none",
        f"workload.num_requests={REQUESTS}",
        "workload.output_len=24",
        f"{where}={folder / 'runs'}",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT))),
        "HEADWAY_FAULT": case.fault,
        "HEADWAY_MOMENT": case.moment,
        "OMP_NUM_THREADS": "1",
    }
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        printed += "\nstood still for 90 s"
    outlived = processes_left(process.pid)
    jobs = sorted((folder / "runs").glob("[0-9]*")) if case.layout == "sweep" else [folder / "runs"]
    unfinished = [str(path.relative_to(folder)) for path in (folder / "runs").rglob("*.part*")]
    return Outcome(
        process.returncode,
        printed,
        [read(job) for job in jobs],
        unfinished,
        outlived,
        time.monotonic() - began,
    )


def read(job: Path) -> dict | None:
    """The job's result.json; {} where there is none."""
    path = job / "result.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return None


def processes_left(session: int) -> list[int]:
    """Processes of a session that are still there after GONE seconds; ends them."""
    deadline = time.monotonic() + GONE
    while (left := _members(session)) and time.monotonic() < deadline:
        os.sched_yield()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def _members(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # state, parent, group, session ...
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


# ---- verdicts --------------------------------------------------------------------------------------------


def faults_found(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with the outcome; nothing where the promise of docs/reliability.md is kept."""
    wrong = []
    if f"fault: {case.fault} at {case.moment}" not in outcome.printed:
        wrong.append("the fault never happened")
    if outcome.outlived:
        wrong.append(f"processes outlived the run: {outcome.outlived}")
    if outcome.unfinished and case.fault != "SIGKILL":
        wrong.append(f"scratch files were left: {outcome.unfinished}")
    if "Traceback (most recent call last)" in outcome.printed:
        wrong.append("a traceback was printed")
    if outcome.code not in codes(case):
        wrong.append(f"exit code {outcome.code}, expected one of {sorted(codes(case))}")
    if None in outcome.results:
        wrong.append("a result.json is not whole")
    statuses = [result.get("status", "") for result in outcome.results if result is not None]
    struck = statuses[0] if statuses else ""
    if struck not in expected_statuses(case):
        wrong.append(f"status {struck!r}, expected one of {sorted(expected_statuses(case))}")
    for result in outcome.results:
        summary = (result or {}).get("summary") or {}
        ended = sum(summary.get(kind, 0) for kind in ("completed", "rejected", "aborted"))
        if summary and ended != summary["num_requests"]:
            wrong.append(f"{summary['num_requests']} requests, {ended} accounted for")
    if case.layout == "sweep" and goes_on(case) and statuses != [struck, "finished"]:
        wrong.append(f"the sweep did not go on: {statuses}")
    return wrong


def codes(case: Case) -> set[int]:
    if case.fault == "SIGKILL":
        return {-signal.SIGKILL}
    if case.fault in SIGNALS:
        return {128 + signal.Signals[case.fault.split()[0]]}
    return {1} if case.moment in ("running", "writing") else {1, 2}


def expected_statuses(case: Case) -> set[str]:
    """Of the job that the fault struck; "" is no result.json."""
    if case.moment == "importing":
        return {""}
    if case.fault == "SIGKILL":
        return {"", "finished"} if case.moment == "writing" else {""}
    if case.fault in SIGNALS:
        return {"finished", "interrupted"} if case.moment == "writing" else {"interrupted"}
    if case.fault == "disk full":
        # What is there is whole. While the other files are written, result.json is there already: it comes
        # first.
        return {"failed", "finished", ""} if case.moment == "writing" else {"failed", ""}
    return {"failed"}


def goes_on(case: Case) -> bool:
    return case.fault in ("raise", "exit")


def main(words: list[str]) -> int:
    chosen = [case for case in MATRIX if all(word in str(case) for word in words)]
    broken = 0
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(case, Path(folder))
        wrong = faults_found(case, outcome)
        broken += bool(wrong)
        print(
            f"{'WRONG' if wrong else 'ok':<6} {outcome.seconds:5.1f} s  {str(case):<36} {'; '.join(wrong)}",
            flush=True,
        )
        if wrong and "-v" in sys.argv:
            print(outcome.printed)
    print(f"{len(chosen) - broken} passed, {broken} failed")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if word != "-v"]))
