"""The table that ends a sweep: columns that only some runs have, and runs that took the same decisions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core.cli.launch import compare
from core.measure.report import comparison_csv, comparison_rows, doubts, notes
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


# ---- what a difference means -------------------------------------------------------------------------------


def simulated(number: int, *overrides: str, error: float | None = 0.1, **summary: Any) -> dict[str, Any]:
    return job(number, *overrides, time_model="roofline of a card", time_model_error=error, **summary)


def cells(runs: list[dict[str, Any]], heading: str) -> list[str]:
    rows = comparison_rows(runs)
    return [row[rows[0].index(heading)].strip() for row in rows[1:]]


def test_what_the_time_models_error_explains_ties_with_the_best_and_what_it_does_not_is_unmarked():
    runs = [
        simulated(0, "order=fcfs", mean_ttft_ms=100.0, output_throughput=50.0),
        simulated(1, "order=sjf", mean_ttft_ms=109.0, output_throughput=40.0),
        simulated(2, "order=vtc", mean_ttft_ms=130.0, output_throughput=30.0),
    ]
    assert cells(runs, "TTFT ms") == ["100.0=", "109.0=", "130.0"]
    assert cells(runs, "tok/s") == ["50.0", "40.0", "30.0"], (
        "more is better here, and 40 is further from 50 than a tenth"
    )
    (told,) = doubts(runs)
    assert told.startswith("= ties with the best of its column")
    assert "roofline of a card (stated error of a step's time 10.0%). One seed each" in told


def test_ties_are_stored_pair_by_pair_also_among_those_that_are_not_best(tmp_path):
    runs = [
        simulated(i, f"order=o{i}", mean_ttft_ms=value)
        for i, value in enumerate((100.0, 200.0, 210.0, 225.0))
    ]
    compare(tmp_path, runs)
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [row.get("ties", {}).get("mean_ttft_ms") for row in rows] == [None, ["2"], ["1", "3"], ["2"]]
    assert "ties" not in (tmp_path / "comparison.csv").read_text()
    assert "= ties with the best" in (tmp_path / "comparison.md").read_text()


def test_seeds_of_a_composition_are_one_competitor_and_their_spread_is_doubt():
    def swept(*pairs: tuple[str, float]) -> list[dict[str, Any]]:
        return [
            job(i, f"order={order}", f"seed={i % 3}", mean_ttft_ms=value)
            for i, (order, value) in enumerate(pairs)
        ]

    wide = swept(("fcfs", 90), ("fcfs", 100), ("fcfs", 110), ("vtc", 95), ("vtc", 115), ("vtc", 120))
    assert cells(wide, "TTFT ms") == ["90.0=", "100.0=", "110.0=", "95.0=", "115.0=", "120.0="]
    narrow = swept(("fcfs", 99), ("fcfs", 100), ("fcfs", 101), ("vtc", 109), ("vtc", 110), ("vtc", 111))
    assert cells(narrow, "TTFT ms") == ["99.0", "100.0", "101.0", "109.0", "110.0", "111.0"]
    assert "Times are measured." in doubts(narrow)[0] and "One seed" not in doubts(narrow)[0]


def test_runs_of_another_load_do_not_compete():
    runs = [
        simulated(i, f"workload.rate={rate}", f"order={order}", mean_ttft_ms=value)
        for i, (rate, order, value) in enumerate(
            [(1, "fcfs", 10.0), (1, "vtc", 20.0), (2, "fcfs", 19.5), (2, "vtc", 40.0)]
        )
    ]
    assert cells(runs, "TTFT ms") == ["10.0", "20.0", "19.5", "40.0"]


def test_the_time_models_error_does_not_blur_what_is_no_time():
    runs = [
        simulated(0, "cache=hash", prefix_hit_rate=0.50),
        simulated(1, "cache=radix", prefix_hit_rate=0.49),
    ]
    assert cells(runs, "hits") == ["50.0%", "49.0%"]


def test_without_a_stated_error_nothing_is_marked_and_a_warning_says_so():
    runs = [simulated(i, f"order=o{i}", error=None, mean_ttft_ms=100.0 + i) for i in range(2)]
    assert cells(runs, "TTFT ms") == ["100.0", "101.0"]
    assert "its error was never measured" in doubts(runs)[0] and doubts(runs)[1].startswith(
        "warning: a time model states no error"
    )


def test_a_run_that_failed_competes_with_nobody():
    runs = [job(0, "order=fcfs", mean_ttft_ms=5.0), job(1, "order=vtc", status="failed", mean_ttft_ms=5.0)]
    assert cells(runs, "TTFT ms") == ["5.0", "5.0"]
