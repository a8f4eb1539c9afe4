"""`python -m experiments.fidelity compare`: errors of metrics and rankings between two stored sets of
runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from core.errors import HeadwayError
from experiments.fidelity import compared, kendall, main


def run(number: int, *overrides: str, error: float | None = -1.0, **summary: Any) -> dict[str, Any]:
    model = {} if error == -1.0 else {"time_model": "a model", "time_model_error": error}
    return {
        "directory": f"{number}",
        "status": "finished",
        "error": "",
        "overrides": list(overrides),
        "summary": summary | model,
    }


def sweep(folder: Path, runs: list[dict[str, Any]]) -> str:
    for one in runs:
        (folder / one["directory"]).mkdir(parents=True)
        (folder / one["directory"] / "result.json").write_text(json.dumps(one))
    return str(folder)


ORDERS = ("fcfs", "sjf", "vtc", "srpt")


def side(
    values: tuple[float, ...], *beside: str, metric: str = "mean_ttft_ms", error: float | None = -1.0
) -> list[dict[str, Any]]:
    return [
        run(i, f"order={order}", *beside, error=error, **{metric: value})
        for i, (order, value) in enumerate(zip(ORDERS, values, strict=False))
    ]


@pytest.mark.parametrize(
    "a, b, tau",
    [
        ((1, 2, 3, 4), (10, 20, 30, 40), 1.0),
        ((1, 2, 3, 4), (40, 30, 20, 10), -1.0),
        ((1, 2, 3, 4), (10, 30, 20, 40), 4 / 6),  # one of six pairs the wrong way round
        ((1, 1, 3, 4), (10, 20, 30, 40), 5 / math.sqrt(5 * 6)),  # tau-b: a side tells five of six apart
    ],
)
def test_tau_is_kendalls_over_the_pairs_of_compositions(a, b, tau):
    assert compared(side(a), side(b))["rankings"]["mean_ttft_ms"]["tau"] == pytest.approx(tau)


def test_tau_of_nothing_told_apart_does_not_exist():
    assert math.isnan(kendall([])) and math.isnan(kendall([(0, 1), (0, -1)]))


def test_errors_are_relative_to_the_second_side_and_repeats_are_averaged():
    b = [*side((100.0, 200.0), "seed=1"), *side((120.0, 200.0), "seed=2")]
    first, second = compared(side((99.0, 210.0), "executor=sim"), b)["compositions"]
    assert first["name"] == "order=fcfs" and first["repeats"] == [1, 2]
    assert first["metrics"]["mean_ttft_ms"] == pytest.approx(
        {"a": 99.0, "b": 110.0, "error": -0.1, "spread": 20 / 110}
    )
    assert second["metrics"]["mean_ttft_ms"] == pytest.approx(
        {"a": 210.0, "b": 200.0, "error": 0.05, "spread": 0.0}
    )


def test_a_pair_that_one_side_calls_a_tie_is_no_contradiction_and_is_listed():
    """The simulator cannot tell 100 from 105 within its 10%; the measured side says that the first is
    worse."""
    a = side((100.0, 105.0, 300.0), error=0.1)
    found = compared(a, side((110.0, 100.0, 250.0)))["rankings"]["mean_ttft_ms"]
    assert [(p["a"], p["b"]) for p in found["pairs"]] == [
        ("tie", "worse"),
        ("better", "better"),
        ("better", "better"),
    ]
    assert (found["same_verdict"], found["opposite_verdict"]) == (2, 0)
    assert found["tau"] == pytest.approx(1 / 3) and found["tau_by_verdict"] == pytest.approx(
        2 / math.sqrt(2 * 3)
    )


def test_more_is_better_where_it_is():
    found = compared(
        side((3.0, 1.0), metric="output_throughput"), side((2.0, 1.0), metric="output_throughput")
    )
    (pair,) = found["rankings"]["output_throughput"]["pairs"]
    assert (pair["a"], pair["b"]) == ("better", "better")


def test_compositions_of_different_loads_are_not_ranked_against_each_other():
    a = [
        run(i, f"order={o}", f"workload.rate={r}", mean_ttft_ms=v)
        for i, (o, r, v) in enumerate([("fcfs", 1, 1), ("vtc", 1, 2), ("fcfs", 2, 3), ("vtc", 2, 4)])
    ]
    assert len(compared(a, a)["rankings"]["mean_ttft_ms"]["pairs"]) == 2


def test_who_runs_the_plans_and_what_is_constant_on_a_side_do_not_hinder_the_match():
    a = side((1.0, 2.0), "executor=sim", "executor.like=there", "engine.num_blocks=6000")
    b = side((1.0, 2.0), "executor=torch", "kernels=triton", "model.load_format=dummy")
    found = compared(a, b)
    assert [one["name"] for one in found["compositions"]] == ["order=fcfs", "order=sjf"] and not found[
        "alone"
    ]


def test_runs_on_two_cards_are_no_repeats_of_each_other():
    a = [*side((1.0, 2.0), "hardware=h100"), *side((3.0, 4.0), "hardware=h200")]
    with pytest.raises(HeadwayError, match="hardware is not the same in all runs of a side"):
        compared(a, side((1.0, 2.0)))


def test_the_report_of_two_folders_is_written_and_says_who_is_alone(tmp_path, capsys):
    a = sweep(
        tmp_path / "a",
        [*side((100.0, 150.0, 90.0), error=0.05), run(9, "order=edf", mean_ttft_ms=1.0, error=0.05)],
    )
    b = sweep(tmp_path / "b", side((80.0, 160.0, 95.0)))
    again = sweep(tmp_path / "again", side((84.0, 160.0, 95.0)))
    out = tmp_path / "page.md"
    assert main(["compare", a, b, again, "--out", str(out), "--json", str(tmp_path / "page.json")]) == 0
    text = capsys.readouterr().out
    assert text.strip() == out.read_text().strip()
    assert (
        "A: a model, stated error 5.0%" in text
        and "B: measured" in text
        and "only in the first: order=edf" in text
    )
    assert "+22.0% (4.9%)" in text, "100 against 80 and 84"
    row = next(line for line in text.splitlines() if line.startswith("| TTFT mean") and "worse" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "TTFT mean",
        "order=fcfs",
        "order=vtc",
        "worse",
        "better",
    ]
    assert (
        json.loads((tmp_path / "page.json").read_text())["rankings"]["mean_ttft_ms"]["opposite_verdict"] == 1
    )


def test_folders_without_runs_or_without_a_common_composition_are_refused(tmp_path, capsys):
    a = sweep(tmp_path / "a", side((1.0, 2.0)))
    assert main(["compare", a, str(tmp_path / "none")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    other = sweep(
        tmp_path / "other", [run(0, "order=edf", mean_ttft_ms=1.0), run(1, "order=lpm", mean_ttft_ms=1.0)]
    )
    assert main(["compare", a, other]) == 2
    assert "no composition is on both sides" in capsys.readouterr().err
