"""The table that ends a sweep: columns that only some runs have, and runs that took the same decisions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core.cli.launch import compare
from core.measure.report import comparison_csv, comparison_rows, notes
from core.measure.results import comparison


def job(
    number: int, *overrides: str, hash: str = "", status: str = "finished", **summary: Any
) -> dict[str, Any]:
    known = {
        "decision_hash": hash or f"hash{number}",
        "num_steps": 5,
        "num_requests": 3,
        "total_output_tokens": 9,
        "completed": 3,
    }
    return {
        "directory": f"sweep/{number}",
        "status": status,
        "error": "",
        "overrides": list(overrides),
        "summary": known | summary,
    }


def test_a_column_is_there_when_any_run_has_a_number_and_a_dash_where_one_has_none(monkeypatch):
    monkeypatch.setattr(
        "core.measure.report.COMPARED",
        (("completed", "done", "d"), ("service_difference", "service", ".0f"), ("never", "never", "d")),
    )
    runs = [
        job(0, "order=fcfs", service_difference=1234.4, never=None),
        job(1, "order=vtc", never=float("nan")),
    ]
    rows = comparison_rows(runs)
    assert rows == [
        ["job", "order", "done", "service", "status"],
        ["0", "fcfs", "3", "1,234", "finished"],
        ["1", "vtc", "3", "-", "finished"],
    ]


def test_runs_that_took_the_same_decisions_are_named_with_what_made_no_difference():
    runs = [
        job(0, "scheduler=fcfs", "cache=none", hash="a"),
        job(1, "scheduler=fcfs", "cache=hash", hash="b"),
        job(2, "scheduler=fcfs", "cache=radix", hash="b"),
        job(3, "scheduler=chunked", "cache=none", hash="c"),
    ]
    assert notes(runs) == [
        "note: jobs 1 and 2 took the same decisions, step for step: cache=hash,radix made no difference to "
        "them"
    ]
    rows = comparison(runs)
    assert [row.get("same_decisions_as") for row in rows] == [None, ["2"], ["1"], None]
    assert "same_decisions_as" in comparison_csv(runs).splitlines()[0]


def test_three_and_more_are_one_note_and_two_things_may_differ():
    runs = [
        job(i, f"cache={cache}", f"seed={seed}", "order=fcfs", hash="a")
        for i, (cache, seed) in enumerate([("hash", 1), ("radix", 1), ("radix", 2)])
    ]
    assert notes(runs) == [
        "note: jobs 0, 1 and 2 took the same decisions, step for step: cache=hash,radix seed=1,2 made no "
        "difference to them"
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"hash": "b"},
        {"hash": "a", "status": "failed"},
        {"hash": "a", "status": "interrupted"},
        {"hash": "a", "total_output_tokens": 8},
        {"hash": "a", "num_steps": 0},
    ],
)
def test_runs_that_differ_or_did_not_end_are_not_called_the_same(other):
    assert notes([job(0, "cache=hash", hash="a"), job(1, "cache=radix", **other)]) == []


def test_the_note_is_under_the_table_and_in_the_files(tmp_path):
    runs = [job(0, "cache=hash", hash="a"), job(1, "cache=radix", hash="a")]
    note = (
        "note: jobs 0 and 1 took the same decisions, step for step: cache=hash,radix made no difference to "
        "them"
    )
    assert note in compare(tmp_path, runs).splitlines()
    assert (tmp_path / "comparison.md").read_text().endswith(f"\n\n{note}\n")
    assert [row["same_decisions_as"] for row in json.loads((tmp_path / "comparison.json").read_text())] == [
        ["1"],
        ["0"],
    ]
