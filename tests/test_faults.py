"""A small part of the fault matrix (faults.py), and proof that its verdicts can fail."""

from __future__ import annotations

import sys

import pytest
from helpers.faults import MATRIX, Case, Outcome, faults_found, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")

SMALL = [
    Case("SIGTERM", "running", "simulated"),
    Case("SIGINT twice", "running", "simulated"),
    Case("SIGHUP", "writing", "simulated"),
    Case("disk full", "running", "simulated"),
    Case("exit", "running", "sweep"),
    Case("SIGKILL", "connecting", "tp=2"),
    Case("rank stopped", "connecting", "tp=2"),
    Case("SIGTERM", "running", "pp=2"),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_fault_leaves_what_is_promised(case, tmp_path):
    outcome = run(case, tmp_path)
    assert not faults_found(case, outcome), outcome.printed


def test_the_matrix_holds_every_case_of_the_small_part():
    assert set(SMALL) <= set(MATRIX)


KEPT = Outcome(
    143,
    "fault: SIGTERM at running",
    [{"status": "interrupted", "summary": {"num_requests": 3, "completed": 1, "aborted": 2}}],
    [],
    [],
    1.0,
)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"printed": ""}, "never happened"),
        ({"outlived": [7]}, "outlived"),
        ({"unfinished": ["runs/summary.json.part"]}, "scratch files"),
        ({"printed": KEPT.printed + "\nTraceback (most recent call last):"}, "traceback"),
        ({"code": 0}, "exit code 0"),
        ({"results": [None]}, "not whole"),
        ({"results": [{"status": "finished"}]}, "status 'finished'"),
        (
            {"results": [{"status": "interrupted", "summary": {"num_requests": 3, "completed": 1}}]},
            "1 accounted for",
        ),
    ],
)
def test_a_broken_promise_is_found(change, finding):
    case = Case("SIGTERM", "running", "simulated")
    assert not faults_found(case, KEPT)
    assert any(finding in wrong for wrong in faults_found(case, Outcome(**{**vars(KEPT), **change})))
