"""Metric definitions, each against numbers worked out by hand. They are those of `vllm bench serve`."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.metrics import PROMPT_WEIGHT, fairness, itl, jain, meets_slo, percentile, summarize, tpot, ttft
from core.report import comparison_rows, run_table, table
from headway import SLO, RequestOutput, RunResult, Tags


def output(index: int = 0, times: tuple[float, ...] = (), *, arrival: float = 0.0, state: str = "finished", **fields) -> RequestOutput:
    given = {
        "first_scheduled_time": arrival if times else -1.0, "finish_time": times[-1] if times else arrival, "num_prompt_tokens": 10,
        "num_cached_tokens": 0, "num_preemptions": 0, "num_recomputed_tokens": 0, "tags": Tags(), "slo": SLO(),
    } | fields  # fmt: skip
    return RequestOutput(
        id=f"r{index}", index=index, state=state, finish_reason="stop", arrival_time=arrival,
        output_token_ids=list(range(len(times))), token_times=list(times), **given,
    )  # fmt: skip


def test_latencies_of_one_request():
    o = output(times=(1.5, 1.7, 2.1, 2.5), arrival=1.0)
    assert ttft(o) == pytest.approx(0.5)
    assert tpot(o) == pytest.approx((2.5 - 1.5) / 3)
    assert itl(o) == pytest.approx([0.2, 0.4, 0.4])


def test_one_token_has_no_tpot_and_no_gap_and_none_has_nothing():
    assert tpot(output(times=(1.0,))) is None
    assert itl(output(times=(1.0,))) == []
    assert ttft(output()) is None


def test_summary_of_a_run():
    outputs = [
        output(0, (1.0, 2.0, 3.0), num_cached_tokens=4),
        output(1, (2.0, 4.0), arrival=1.0, num_preemptions=1, num_recomputed_tokens=7),
        output(2, state="rejected", num_prompt_tokens=1000),
        output(3, (3.5,), arrival=3.0, state="aborted"),
    ]
    s = summarize(RunResult(outputs, duration=4.0, num_steps=5, policy_time=5e-5, busy_time=2.0, kv_total=40, kv_peak=10, num_preemptions=1))
    assert (s["num_requests"], s["completed"], s["rejected"], s["aborted"]) == (4, 2, 1, 1)
    assert s["total_output_tokens"] == 6
    assert s["request_throughput"] == pytest.approx(2 / 4)
    assert s["output_throughput"] == pytest.approx(6 / 4)
    assert s["total_token_throughput"] == pytest.approx((6 + 20) / 4)
    assert s["mean_ttft_ms"] == pytest.approx(1000)
    assert s["mean_tpot_ms"] == pytest.approx((1000 + 2000) / 2)
    assert s["mean_itl_ms"] == pytest.approx((1000 + 1000 + 2000) / 3)  # every gap counts once, whoever it belongs to
    assert s["p50_e2el_ms"] == pytest.approx(3000)
    assert s["prefix_hit_rate"] == pytest.approx(4 / 30)  # of admitted requests: the rejected prompt is not in it
    assert s["recomputed_tokens"] == 7
    assert s["kv_peak_use"] == 0.25
    assert s["busy_share"] == 0.5
    assert s["policy_time_per_step_us"] == pytest.approx(10)
    assert "request_goodput" not in s


def test_goodput_counts_requests_that_meet_every_target():
    slo = SLO(ttft=1.0, tpot=0.5)
    outputs = [
        output(0, (1.0, 1.5), slo=slo),  # meets both, on the edge
        output(1, (1.1, 1.2), slo=slo),  # first token late
        output(2, (0.5, 1.1), slo=slo),  # tokens too slow
        output(3, (0.5,), slo=slo),  # one token: no TPOT to miss
    ]
    assert [meets_slo(o) for o in outputs] == [True, False, False, True]
    s = summarize(RunResult(outputs, duration=2.0))
    assert s["slo_attainment"] == 0.5
    assert s["request_goodput"] == pytest.approx(1.0)


def test_rejected_and_aborted_requests_miss_their_targets_and_those_without_targets_do_not_count():
    slo = SLO(e2el=100.0)
    outputs = [output(0, (1.0,), slo=slo), output(1, state="rejected", slo=slo), output(2, (1.0,), state="aborted", slo=slo), output(3, (1.0,))]
    assert [meets_slo(o) for o in outputs] == [True, False, False, None]
    assert summarize(RunResult(outputs, duration=1.0))["slo_attainment"] == pytest.approx(1 / 3)


def test_a_run_in_which_nothing_finished_has_a_summary_and_a_table():
    s = summarize(RunResult([output(state="rejected")], status="failed"))
    assert math.isnan(s["mean_ttft_ms"]) and s["request_throughput"] == 0
    assert "0 of 1 finished, 1 rejected" in run_table(s)


def test_rejections_are_counted_by_kind_in_the_words_of_the_first():
    reasons = ["needs 10 blocks, the pool has 4", "empty prompt", "needs 12 blocks, the pool has 4", "id 'a' is taken", "id 'b' is taken"]
    s = summarize(RunResult([replace(output(i, state="rejected"), finish_reason=reason) for i, reason in enumerate(reasons)]))
    counted = [(r["count"], r["reason"]) for r in s["rejections"]]
    assert counted == [
        (2, "needs 10 blocks, the pool has 4"),
        (2, "id 'a' is taken"),
        (1, "empty prompt"),
    ]
    assert "2: needs 10 blocks, the pool has 4\n" in run_table(s)
    assert "rejections" not in summarize(RunResult([output(times=(1.0,))]))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_percentiles_interpolate_as_the_standard_library_does(values):
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive")
    assert [percentile(ordered, p) for p in (25, 50, 75)] == pytest.approx(quartiles, abs=1e-6)
    assert percentile(ordered, 0) == ordered[0] and percentile(ordered, 100) == ordered[-1]


def test_fairness_looks_at_the_window_in_which_every_client_has_work():
    a, b = Tags(client="a"), Tags(client="b")
    outputs = [
        output(0, (1.0, 2.0), arrival=0.0, tags=a),  # its first token comes before b has arrived
        output(1, (2.5, 3.0), arrival=1.5, tags=b),
        output(2, (2.6, 9.0), arrival=1.0, tags=a),
    ]
    # The window is [1.5, 3.0]: b's arrival to b's last token. a: one token of 0, prompt and one token of 2. b: prompt and two tokens.
    f = fairness(outputs)
    assert f["service_difference"] == pytest.approx((2 + PROMPT_WEIGHT * 10 + 2) - (PROMPT_WEIGHT * 10 + 4))
    assert f["jain_index"] == pytest.approx(1.0)
    assert f["num_clients"] == 2


def test_fairness_of_one_client_is_left_out():
    assert fairness([output(0, (1.0,), tags=Tags(client="a")), output(1, (1.0,))]) == {}


def test_jain_index_is_one_for_equals_and_one_nth_for_a_monopoly():
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([9.0, 0.0, 0.0]) == pytest.approx(1 / 3)
    assert math.isnan(jain([0.0, 0.0]))


def test_a_comparison_has_a_row_a_run_and_a_column_for_each_thing_varied():
    results = [
        {
            "directory": "s/0",
            "status": "finished",
            "error": "",
            "overrides": ["seed=1", "cache=none"],
            "summary": {"completed": 3, "p99_ttft_ms": 1.25},
        },
        {"directory": "s/1", "status": "failed", "error": "boom", "overrides": ["seed=1", "cache=hash"], "summary": {}},
    ]
    rows = comparison_rows(results)
    assert rows[0] == ["job", "cache", "done", "P99", "status"]
    assert rows[1] == ["0", "none", "3", "1.2", "finished"]
    assert rows[2] == ["1", "hash", "-", "-", "failed"]
    assert table(rows, markdown=True).splitlines()[1].count("|") == 6
