"""Metric definitions, each against numbers worked out by hand. They are those of `vllm bench serve`."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from core.measure.fairness import by_client, fairness, jain, service_difference
from core.measure.metrics import itl, meets_slo, percentile, summarize, tpot, ttft
from core.measure.report import comparison_rows, run_table, table
from headway import SLO, RequestOutput, RunResult, Tags


def output(
    index: int = 0, times: tuple[float, ...] = (), *, arrival: float = 0.0, state: str = "finished", **fields
) -> RequestOutput:
    given = {
        "first_scheduled_time": arrival if times else -1.0,
        "finish_time": times[-1] if times else arrival,
        "num_prompt_tokens": 10,
        "num_cached_tokens": 0,
        "num_preemptions": 0,
        "num_recomputed_tokens": 0,
        "tags": Tags(),
        "slo": SLO(),
    } | fields
    return RequestOutput(
        id=f"r{index}",
        index=index,
        state=state,
        finish_reason="stop",
        arrival_time=arrival,
        output_token_ids=list(range(len(times))),
        token_times=list(times),
        **given,
    )


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
    s = summarize(
        RunResult(
            outputs,
            duration=4.0,
            num_steps=5,
            policy_time=5e-5,
            busy_time=2.0,
            kv_total=40,
            kv_peak=10,
            num_preemptions=1,
        )
    )
    assert (s["num_requests"], s["completed"], s["rejected"], s["aborted"]) == (4, 2, 1, 1)
    assert s["total_output_tokens"] == 6
    assert s["request_throughput"] == pytest.approx(2 / 4)
    assert s["output_throughput"] == pytest.approx(6 / 4)
    assert s["total_token_throughput"] == pytest.approx((6 + 20) / 4)
    assert s["mean_ttft_ms"] == pytest.approx(1000)
    assert s["mean_tpot_ms"] == pytest.approx((1000 + 2000) / 2)
    # every gap counts once, whoever it belongs to
    assert s["mean_itl_ms"] == pytest.approx((1000 + 1000 + 2000) / 3)
    assert s["p50_e2el_ms"] == pytest.approx(3000)
    # of admitted requests: the rejected prompt is not in it
    assert s["prefix_hit_rate"] == pytest.approx(4 / 30)
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
    outputs = [
        output(0, (1.0,), slo=slo),
        output(1, state="rejected", slo=slo),
        output(2, (1.0,), state="aborted", slo=slo),
        output(3, (1.0,)),
    ]
    assert [meets_slo(o) for o in outputs] == [True, False, False, None]
    assert summarize(RunResult(outputs, duration=1.0))["slo_attainment"] == pytest.approx(1 / 3)


def test_a_run_in_which_nothing_finished_has_a_summary_and_a_table():
    s = summarize(RunResult([output(state="rejected")], status="failed"))
    assert math.isnan(s["mean_ttft_ms"]) and s["request_throughput"] == 0
    assert "0 of 1 finished, 1 rejected" in run_table(s)


def test_rejections_are_counted_by_kind_in_the_words_of_the_first():
    reasons = [
        "needs 10 blocks, the pool has 4",
        "empty prompt",
        "needs 12 blocks, the pool has 4",
        "id 'a' is taken",
        "id 'b' is taken",
    ]
    s = summarize(
        RunResult(
            [replace(output(i, state="rejected"), finish_reason=reason) for i, reason in enumerate(reasons)]
        )
    )
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


def asked(
    index: int,
    client: str,
    arrival: float,
    start: float,
    *times: float,
    state: str = "finished",
    end: float = 10.0,
) -> RequestOutput:
    """A request of 10 prompt tokens that waits from `arrival` to `start` (-1: never started), and whose
    tokens come at `times`."""
    fields = {
        "tags": Tags(client=client),
        "first_scheduled_time": start,
        "finish_time": times[-1] if times else end,
    }
    return output(index, times, arrival=arrival, state=state, **fields)


def test_jains_index_looks_at_the_window_from_the_last_first_arrival_to_the_first_last_token():
    outputs = [
        asked(0, "a", 0.0, 0.5, 1.0, 2.0),  # its first token, and its prompt, come before b has arrived
        asked(1, "b", 1.5, 2.0, 2.5, 3.0),
        asked(2, "a", 1.0, 2.0, 2.6, 9.0),  # its last token comes when b has left
    ]
    assert fairness(outputs)["jain_index"] == pytest.approx(jain([2 + 10 + 2, 10 + 2 + 2]))
    assert fairness(outputs)["num_clients"] == 2


def test_service_difference_is_over_intervals_in_which_both_clients_wait():
    outputs = [
        asked(0, "a", 0.0, 0.0, 1.0, 2.0, 3.0),
        asked(1, "a", 0.0, 2.5, 3.5),  # a waits in (0, 2.5]
        # b waits in (1, 4]: both in (1, 2.5], in which a gets its token of 2.0, and b nothing
        asked(2, "b", 1.0, 4.0, 4.5),
    ]
    assert fairness(outputs)["service_difference"] == 2.0
    # a has stopped waiting when b begins to
    alone = [asked(0, "a", 0.0, 1.0, 2.0), asked(1, "b", 1.5, 3.0, 4.0)]
    assert fairness(alone)["service_difference"] == 0.0


def test_the_largest_difference_may_lie_between_two_times_in_the_middle():
    outputs = [asked(0, "a", 0.0, 9.0, 9.5), asked(1, "b", 0.0, 9.0, 9.5)]  # both wait all along
    outputs += [
        asked(2, "a", 0.0, 0.0, 1.0),
        asked(3, "b", 0.0, 0.0, 2.0),
        asked(4, "b", 0.0, 0.0, 3.0),
        asked(5, "a", 0.0, 0.0, 4.0),
    ]
    # a leads by 12, 0, -12, 0: the lead falls by 24 from 1 to 3, though it is never larger than 12.
    assert fairness(outputs)["service_difference"] == 24.0


@pytest.mark.parametrize(
    "state, start, end",
    [("aborted", -1.0, 10.0), ("rejected", -1.0, 0.0), ("rejected", -1.0, 4.0), ("aborted", 9.0, 10.0)],
)
def test_a_client_that_was_never_served_counts_as_the_one_who_got_nothing(state, start, end):
    served = [asked(i, client, 0.0, i + 0.5, i + 1.0, 10.0) for i, client in enumerate("abab")]
    starved = asked(9, "c", 0.0, start, state=state, end=end)
    f = fairness([*served, starved])
    assert f["num_clients"] == 3
    assert f["jain_index"] == pytest.approx(2 / 3, abs=1e-3), "two of three have it all"
    assert f["service_difference"] >= 12.0
    only = fairness([o for o in served if o.tags.client == "a"] + [starved])
    assert (only["num_clients"], only["jain_index"]) == (2, 0.5)


@st.composite
def runs_of_clients(draw):
    outputs = []
    for i in range(draw(st.integers(2, 12))):
        arrival = draw(st.integers(0, 8))
        start = draw(st.one_of(st.just(-1), st.integers(arrival, 12)))
        times = [] if start < 0 else sorted(draw(st.lists(st.integers(start + 1, 16), max_size=4)))
        outputs.append(
            asked(
                i, draw(st.sampled_from("abcd")), arrival, start, *times, end=draw(st.integers(arrival, 17))
            )
        )
    return outputs


@settings(deadline=None)  # it is about answers, on machines of any speed
@given(runs_of_clients())
def test_service_difference_is_that_of_every_pair_and_every_interval(outputs):
    clients = by_client(outputs)
    run_end = max(o.finish_time for o in outputs)

    def waits(client, begin, end):  # all of (begin, end]
        own = [o for o in outputs if o.tags.client == client]
        if not any(o.token_times for o in own):
            return begin >= min(o.arrival_time for o in own) and end <= run_end
        spans = [
            (o.arrival_time, o.first_scheduled_time if o.first_scheduled_time >= 0 else o.finish_time)
            for o in own
        ]
        return all(any(a <= t and t + 1 <= b for a, b in spans) for t in range(begin, end))

    def service(client, begin, end):
        own = [o for o in outputs if o.tags.client == client and o.token_times]
        return sum(
            10 * (begin < o.token_times[0] <= end) + 2 * sum(begin < t <= end for t in o.token_times)
            for o in own
        )

    worst = 0.0
    for begin in range(18):
        for end in range(begin + 1, 18):
            both = [service(c, begin, end) for c in clients if waits(c, begin, end)]
            worst = max(worst, max(both) - min(both)) if both else worst
    assert service_difference(list(clients.values())) == worst


def test_vtcs_own_experiment_measures_what_a_run_of_it_prints():
    from experiments import vtc_fairness

    preset = OmegaConf.load(vtc_fairness.CONF / "experiment" / "vtc_fairness.yaml")
    assert preset.workload.duration == 360
    for order, within in (("vtc", True), ("fcfs", False)):
        clients, bound = vtc_fairness.served(order, 60)
        summary = fairness([o for c in clients for o in c.outputs])
        assert bound == 40_000 and (summary["service_difference"] <= bound) is within
        assert summary["service_difference"] == service_difference(clients)
        assert max(d for _, d in vtc_fairness.differences(clients)) <= summary["service_difference"]


def test_fairness_is_in_the_tables_of_a_run_and_of_a_comparison():
    s = summarize(RunResult([asked(0, "a", 0.0, 1.0, 2.0), asked(1, "b", 3.0, 3.0, 4.0)], duration=5.0))
    assert "2 clients, Jain -, service difference 0" in run_table(s), "their windows do not meet"
    together = [asked(i, client, 0.0, 1.0, 2.0) for i, client in enumerate("ab")]
    s = summarize(RunResult(together, duration=5.0))
    run = {"directory": "s/0", "status": "finished", "error": "", "overrides": [], "summary": s}
    heading = comparison_rows([run])[0]
    assert {"Jain", "service diff"} <= set(heading)


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
        {
            "directory": "s/1",
            "status": "failed",
            "error": "boom",
            "overrides": ["seed=1", "cache=hash"],
            "summary": {},
        },
    ]
    rows = comparison_rows(results)
    assert rows[0] == ["job", "cache", "done", "P99", "status"]
    assert rows[1] == ["0", "none", "3", "1.2", "finished"]
    assert rows[2] == ["1", "hash", "-", "-", "failed"]
    assert table(rows, markdown=True).splitlines()[1].count("|") == 6
