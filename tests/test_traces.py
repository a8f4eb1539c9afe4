"""`python -m headway trace` and the formats of trace files: what is read, what is measured, and what is
refused by its line."""

from __future__ import annotations

import json
import re
import statistics
from collections import OrderedDict

import numpy as np
import pytest
from helpers.roles import default_roles
from hypothesis import given, settings
from hypothesis import strategies as st

from core.cli import main as cli
from core.compose.config import EngineConfig, Hardware, ModelShape
from core.engine import Engine
from core.errors import WorkloadError
from core.measure.plot import bars, columns
from core.measure.reuse import PART, ReuseLog, greater_before
from plugins.executors.sim import SimExecutor
from plugins.workloads.agents import Agents
from plugins.workloads.trace import Trace

VOCAB, CONTEXT = 1000, 4096


def file_of(tmp_path, *lines: object, name: str = "trace.jsonl") -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def run(workload, seed: int = 0):
    executor = SimExecutor()
    executor.prepare(ModelShape("LlamaForCausalLM", 64, 2, 4, 2, 16, 128, VOCAB, True, CONTEXT), Hardware())
    engine = Engine(default_roles(executor=executor), EngineConfig(num_blocks=2000), seed=seed)
    return engine.run(workload.arrivals(seed, VOCAB, engine.max_model_len), workload.on_result)


def measured(path: str, capsys, *words: str) -> dict:
    assert cli.main(["trace", path, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- reuse -----------------------------------------------------------------------------------------------


def hits_of_an_lru(prompts: list[tuple[int, list[int]]], capacity: int, block: int) -> float:
    """By the book: leading blocks that are cached are hits, then all are touched, tail first."""
    cached: OrderedDict[int, None] = OrderedDict()
    hit = 0
    for length, ids in prompts:
        leading = next((n for n, id in enumerate(ids) if id not in cached), len(ids))
        hit += min(leading * block, length)
        for id in reversed(ids):
            cached.pop(id, None)
            cached[id] = None
            if len(cached) > capacity:
                cached.popitem(last=False)
    return hit / max(1, sum(length for length, _ in prompts))


@given(st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=40), st.sampled_from([1, 5, PART]))
@settings(max_examples=60, deadline=None)
def test_hit_rates_of_every_capacity_are_those_of_an_lru_cache(paths, part):
    """Prompts are paths in a binary tree, whose nodes are the prefixes; `part` is how many blocks are worked
    on together."""
    prompts = []
    for path in paths:
        ids = [int("1" + "".join(map(str, map(int, path[: n + 1]))), 2) for n in range(len(path))]
        prompts.append((max(0, 4 * len(ids) - len(path) % 4), ids))
    log = ReuseLog()
    for length, ids in prompts:
        log.add(length, ids, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.measure.reuse.PART", part)
        found = log.measured(np.arange(len(prompts)))
    if found is None:
        assert not any(paths)
        return
    for capacity in range(1, found.num_distinct + 2):
        assert found.lru(capacity) == pytest.approx(hits_of_an_lru(prompts, capacity, 4))
    assert (
        found.infinite == pytest.approx(hits_of_an_lru(prompts, 10**6, 4)) == pytest.approx(found.lru(10**6))
    )


@given(st.permutations(range(24)), st.lists(st.booleans(), min_size=24, max_size=24))
@settings(max_examples=40, deadline=None)
def test_the_count_of_greater_ones_before_is_the_counted_one(values, asks):
    found = greater_before(np.array(values, np.int32), np.array(asks))
    expected = [
        sum(v > value and not a for v, a in zip(values[:i], asks[:i], strict=True))
        for i, value in enumerate(values)
    ]
    assert [n for n, a in zip(found, asks, strict=True) if a] == [
        n for n, a in zip(expected, asks, strict=True) if a
    ]


def test_an_id_twice_in_a_prompt_is_another_block_the_second_time():
    log = ReuseLog()
    for _ in range(2):
        log.add(12, [7, 7, 7], 4)
    found = log.measured(np.arange(2))
    assert (found.num_distinct, found.infinite, found.second_half) == (3, 0.5, 1.0)


def moon(time: float, length: int, ids: list[int], output: int = 2) -> dict:
    return {"timestamp": time, "input_length": length, "output_length": output, "hash_ids": ids}


def test_a_trace_is_measured_as_by_hand(tmp_path, capsys):
    """Three prompts of 600 tokens, whose blocks are 512 and 88 tokens, and one that comes first and stands
    last."""
    rows = [
        moon(60_000, 600, [0, 1]),
        moon(90_000, 600, [0, 2]),
        moon(120_000, 600, [0, 1]),
        moon(0, 512, [0]),
    ]
    found = measured(file_of(tmp_path, *rows), capsys)
    assert (found["format"], found["requests"], found["span_s"]) == ("mooncake", 4, 120.0)
    assert found["rate"] == pytest.approx(4 / 120) and found["peak_minute_rate"] == pytest.approx(2 / 60)
    assert found["gap_cv"] == pytest.approx(statistics.pstdev([60, 30, 30]) / 40)
    assert (found["input_tokens"]["total"], found["input_tokens"]["p50"], found["input_tokens"]["max"]) == (
        2312,
        600,
        600,
    )
    reuse = found["reuse"]
    assert (reuse["blocks"], reuse["distinct_blocks"], reuse["reused_blocks"]) == (7, 3, 4)
    assert reuse["infinite_hit_rate"] == pytest.approx((512 + 512 + 600) / 2312)
    assert reuse["infinite_hit_rate_second_half"] == pytest.approx((512 + 600) / 1200)
    # Block 0 is the most recent whenever it is asked for; 2 and the 0 before it lie between both uses of 1.
    assert reuse["reuse_distance"]["p50"] == 0 and reuse["reuse_distance"]["p99"] == 2
    assert reuse["lru_hit_rate"] == {"1": pytest.approx(3 * 512 / 2312), "2": pytest.approx(3 * 512 / 2312)}


def test_what_a_person_reads_has_the_format_the_numbers_and_the_pictures(tmp_path, capsys):
    path = file_of(tmp_path, *(moon(1000 * i, 600, [0, i]) for i in range(1, 100)))
    assert cli.main(["trace", path]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "format         mooncake, guessed\nrequests       99 over 98.0 s, 1.01 a second, in the busiest "
        "minute 1.00\n"
    )
    for part in (
        "infinite cache 84.47% of prompt tokens hit",
        "arrivals over time",
        "hit rate of an LRU cache",
        "reuse distance P50 0",
    ):
        assert part in text


def test_bars_and_columns_show_what_is_small_and_nothing_for_nothing():
    assert columns([0, 0.001, 4, 8], height=1) == [" ▁▄█"]
    assert columns([], height=2) == ["", ""] and columns([0, 0], height=1) == [""]
    assert bars([("a", 1.0, "1"), ("bb", 0.0, "0"), ("c", 1e-9, "x")], width=2) == [
        " a ██ 1",
        "bb  0",
        " c ▏ x",
    ]


# ---- formats ---------------------------------------------------------------------------------------------


def bailian(chat: int, parent: int, time: float, length: int, ids: list[int], **more) -> dict:
    entry = {
        "chat_id": chat,
        "parent_chat_id": parent,
        "timestamp": time,
        "input_length": length,
        "output_length": 4,
    }
    return entry | {"type": "text", "turn": 1, "hash_ids": ids} | more


CHATS = [
    bailian(1, -1, 0.0, 40, [0, 1, 2]),
    bailian(2, 1, 10.0, 50, [0, 1, 3, 4]),
    bailian(3, 1, 10.0, 48, [0, 1, 5]),
    bailian(9, 77, 11.0, 16, [8], type="search"),
]


def test_turns_of_qwen_bailian_wait_for_the_answer_that_they_continue(tmp_path):
    """At a thousandth of its time the second and third turn are due before the first answer is there."""
    outputs = {o.id: o for o in run(Trace(path=file_of(tmp_path, *CHATS), time_scale=1e-6)).outputs}
    first, *branches, alone = (outputs[f"r{i}"] for i in range(4))
    assert all(turn.arrival_time == first.finish_time for turn in branches)
    assert alone.arrival_time == pytest.approx(11e-6), "its parent was asked before the trace begins"
    assert [o.num_cached_tokens for o in branches] == [32, 32], "two blocks of 16 tokens"


def test_requests_know_their_turn_whose_answer_they_waited_for_and_whether_they_are_the_last(tmp_path):
    """A conversation of three, one of a single request, and one that belongs to none."""
    table = ["at,in,out,chat", "0,9,2,a", "1,9,2,b", "2,9,2,a", "3,9,2,", "4,9,2,a"]
    columns = {"time": "at", "input": "in", "output": "out", "session": "chat"}
    path = file_of(tmp_path, *table, name="t.csv")
    found = {o.id: o.tags for o in run(Trace(path=path, **columns)).outputs}
    assert {id: (tags.turn, tags.parents, tags.last) for id, tags in found.items()} == {
        "r0": (0, (), False),
        "r1": (0, (), True),
        "r2": (1, ("r0",), False),
        "r3": (0, (), False),
        "r4": (2, ("r2",), True),
    }
    unanswered = run(Trace(path=path, follow="times", **columns)).outputs
    assert [(o.tags.turn, o.tags.parents) for o in unanswered if o.tags.session == "a"] == [
        (0, ()),
        (1, ()),
        (2, ()),
    ]


def test_turns_keep_the_recorded_distance_where_the_answer_is_there_in_time(tmp_path):
    outputs = run(Trace(path=file_of(tmp_path, *CHATS))).outputs
    assert sorted(o.arrival_time for o in outputs) == pytest.approx([0.0, 10.0, 10.0, 11.0])
    times = [
        a.time
        for a in Trace(path=file_of(tmp_path, *CHATS), follow="times", time_scale=1e-6).arrivals(
            0, VOCAB, CONTEXT
        )
    ]
    assert times == pytest.approx([0, 10e-6, 10e-6, 11e-6])
    assert {
        a.tags.session
        for a in Trace(path=file_of(tmp_path, *CHATS), follow="times").arrivals(0, VOCAB, CONTEXT)
    } == {"1", "9"}


@pytest.mark.parametrize(
    "lines, problem",
    [
        ([CHATS[0], bailian(1, -1, 1.0, 16, [0])], r":2: chat_id 1 is that of line 1 too"),
        (
            [CHATS[0], bailian(2, 1, -1.0, 16, [0])],
            r":2: timestamp -1.0 runs backwards: its parent, line 1, came at 0.0 s",
        ),
        ([CHATS[1], CHATS[0]], r":2: chat_id 1 is the parent of line 1, which stands before it"),
        (
            [CHATS[0], bailian(2, 1, 1.0, 33, [0, 1])],
            r":2: 2 hash_ids of 16 tokens do not cover input_length 33: expected 3",
        ),
        (
            [bailian(1, -1, 0.0, 16, [0, 1])],
            r":1: 2 hash_ids of 16 tokens are too many for input_length 16: expected 1",
        ),
        ([bailian("a", -1, 0.0, 16, [0])], r":1: chat_id 'a': expected a whole number"),
    ],
)
def test_a_chat_that_cannot_be_is_named_by_its_line(tmp_path, lines, problem):
    with pytest.raises(WorkloadError, match=problem):
        list(Trace(path=file_of(tmp_path, *lines)).read())


def pulse(tmp_path, *entries: dict) -> str:
    for name, key in (
        ("1_sys_prompt", "sys_prompt_id"),
        ("2_passages", "passages_id"),
        ("3_history", "history_id"),
        ("4_user_input", "user_input_id"),
        ("5_web_search", "web_search_id"),
    ):
        file_of(tmp_path, *({key: id, "token_length": 20} for id in range(10)), name=f"{name}.jsonl")
    return file_of(tmp_path, *entries, name="0_trace.jsonl")


def asked(time: str, length: int, **ids: list[int]) -> dict:
    every = {"sys_prompt": [], "passages_ids": [], "history": [], "web_search": [], "user_input": []}
    return {
        "timestamp": time,
        "input_length": length,
        "output_length": 3,
        "hash_ids": every | ids,
        "session_id": "s",
    }


def test_ragpulse_prompts_share_what_their_components_share_from_the_front(tmp_path, capsys):
    """Components of 20 tokens each: 40 are shared, which are two whole blocks of 16."""
    same = {"sys_prompt": [1], "passages_ids": [2]}
    path = pulse(tmp_path, asked("9", 66, **same, user_input=[4]), asked("0", 70, **same, user_input=[5]))
    found = measured(path, capsys)
    assert (found["format"], found["sessions"], found["span_s"]) == ("ragpulse", 1, 9.0)
    assert found["reuse"]["infinite_hit_rate"] == pytest.approx(32 / 136)
    outputs = run(Trace(path=path, arrival="uniform", follow="times")).outputs
    assert sorted(o.num_cached_tokens for o in outputs) == [0, 32]


def test_ragpulse_without_a_component_or_its_files_says_so(tmp_path):
    with pytest.raises(WorkloadError, match=r":1: passages_ids 99 is not in 2_passages"):
        list(Trace(path=pulse(tmp_path, asked("0", 30, passages_ids=[99]))).read())
    with pytest.raises(WorkloadError, match=r":1: its components have 40 tokens: more than input_length 30"):
        list(Trace(path=pulse(tmp_path, asked("0", 30, passages_ids=[1, 2]))).read())
    (tmp_path / "alone").mkdir()
    path = file_of(tmp_path / "alone", asked("0", 30))
    with pytest.raises(WorkloadError, match=r"needs 1_sys_prompt\.jsonl beside it"):
        list(Trace(path=path).read())


def session(*calls: tuple[float, int, list[int]]) -> dict:
    return {
        "id": "a",
        "block_size": 64,
        "requests": [{"t": t, "in": n, "out": 3, "hash_ids": ids} for t, n, ids in calls],
    }


def test_agent_sessions_are_measured_without_times_and_replayed_by_their_own_workload(tmp_path, capsys):
    path = file_of(tmp_path, session((0, 130, [1, 2]), (5, 200, [1, 2, 3])))
    found = measured(path, capsys)
    assert (found["format"], found["requests"], found["requests_per_session"]["max"]) == (
        "agents",
        2,
        2,
    ) and "rate" not in found
    assert found["reuse"]["infinite_hit_rate"] == pytest.approx(128 / 330)
    with pytest.raises(WorkloadError, match="use workload=agents"):
        Trace(path=path).check()


@pytest.mark.parametrize(
    "calls, problem",
    [
        (((0, 130, [1, 2, 3]),), "3 hash_ids of 64 tokens contradict 130 input tokens: expected at most 2"),
        (((7, 64, [1]), (5, 64, [1])), r"t 5\.0 runs backwards: the call before it began at 7\.0 s"),
    ],
)
def test_an_agents_call_that_cannot_be_is_refused(tmp_path, calls, problem):
    with pytest.raises(WorkloadError, match=rf":1: {problem}"):
        list(Agents(path=file_of(tmp_path, session(*calls))).sessions())


def span(start: int, *attributes: tuple[str, str, object]) -> dict:
    return {
        "name": "llm_request",
        "startTimeUnixNano": str(start),
        "attributes": [{"key": k, "value": {kind: v}} for k, kind, v in attributes],
    }


def export(*spans: dict) -> dict:
    return {
        "resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {"name": "vllm"}, "spans": list(spans)}]}]
    }


INPUT, OUTPUT = "gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens"


def test_requests_of_vllms_spans_are_those_that_count_tokens(tmp_path):
    lines = [
        export(
            span(
                3 * 10**18,
                (INPUT, "intValue", "12"),
                (OUTPUT, "intValue", "3"),
                ("gen_ai.request.id", "stringValue", "cmpl-1"),
            )
        ),
        export(span(3 * 10**18, ("http.method", "stringValue", "POST"))),
        export(
            span(
                10**18,
                ("gen_ai.usage.input_tokens", "intValue", 5),
                ("gen_ai.usage.output_tokens", "intValue", 6),
            )
        ),
    ]
    rows = list(Trace(path=file_of(tmp_path, *lines)).read())
    assert [(r.time, r.input_len, r.output_len, r.id) for r in rows] == [
        (3e9, 12, 3, "cmpl-1"),
        (1e9, 5, 6, ""),
    ]


@pytest.mark.parametrize(
    "line, problem",
    [
        (export(span(1, (INPUT, "intValue", "12"))), "lacks gen_ai.usage.completion_tokens"),
        (
            export({"attributes": [{"key": name, "value": {"intValue": "1"}} for name in (INPUT, OUTPUT)]}),
            "lacks startTimeUnixNano",
        ),
        ({"resourceSpans": [{"spans": []}]}, "scopeSpans is None"),
        (export({"attributes": ["x"]}), "an attribute is x"),
    ],
)
def test_an_export_of_spans_that_lacks_something_is_named_by_its_line(tmp_path, line, problem):
    with pytest.raises(WorkloadError, match=rf":1: .*{problem}"):
        list(Trace(path=file_of(tmp_path, line)).read())


TALKS = [
    {"id": "a", "conversations": [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 80}]},
    {"id": "b", "conversations": [{"from": "human", "value": "nobody answers"}]},
    {"id": "c", "conversations": [{"from": "human", "value": "{}]"}, {"from": "gpt", "value": "a\n}"}]},
]


@pytest.mark.parametrize(
    "text", [json.dumps(TALKS), json.dumps(TALKS, indent=2), "\n".join(map(json.dumps, TALKS))]
)
def test_sharegpt_is_read_however_its_array_is_broken_into_lines(tmp_path, text, capsys):
    path = file_of(tmp_path, text, name="sharegpt.json")
    assert [(r.input_len, r.output_len) for r in Trace(path=path, format="sharegpt").read()] == [
        (10, 20),
        (1, 1),
    ]
    assert [r.input_len for r in Trace(path=path, characters_per_token=2).read()] == [20, 2]
    with pytest.raises(WorkloadError, match=r"has no times: set workload\.arrival"):
        Trace(path=path).check()
    assert len(run(Trace(path=path, arrival="poisson")).outputs) == 2


def test_a_sharegpt_file_that_is_cut_says_where(tmp_path):
    text = json.dumps(TALKS, indent=2)
    with pytest.raises(WorkloadError, match=r":\d+: no JSON: the file ends within a conversation"):
        list(Trace(path=file_of(tmp_path, text[: len(text) // 2])).read())


RATES = "client,window_start_s,rate_req_per_s,cv,iat_distribution,param1,param2\n"


def mix(tmp_path, rates: str, **pmfs: dict[int, float]) -> Trace:
    lengths = [
        {
            "client": 0,
            "window_start_s": 0,
            "input_tokens": str({10: 0.25, 30: 0.75}),
            "output_tokens": "{5: 1.0}",
            "reason_ratio": "{}",
        },
        {"client": 0, "window_start_s": 21600, "input_tokens": "{}", "output_tokens": "{}"},
        {"client": 1, "window_start_s": 0, "input_tokens": "{7: 1.0}", "output_tokens": "{8: 1.0}"},
    ]
    path = file_of(tmp_path, *lengths, name="lengths.jsonl")
    return Trace(
        path=file_of(tmp_path, (RATES + rates).rstrip(), name="rates.csv"), lengths=path, duration=2400
    )


def test_a_mix_of_clients_has_their_rates_burstiness_and_lengths(tmp_path):
    windows = "".join(f"0,{600 * i},{rate},1,Gamma,0.5,9\n" for i, rate in enumerate((2, 0, 4, 2)))
    rows = list(mix(tmp_path, windows + "1,0,0.5,1,Weibull,2.0,9\n1,600,0.5,1,Weibull,2.0,9\n").read())
    assert rows == sorted(rows, key=lambda r: r.time)
    one, two = ([r for r in rows if r.client == name] for name in ("c0", "c1"))
    assert len(one) == pytest.approx(600 * (2 + 0 + 4 + 2), rel=0.1) and len(two) == pytest.approx(
        600, rel=0.1
    )
    assert not [r for r in one if 600 <= r.time < 1200]
    assert statistics.mean(r.input_len for r in one) == pytest.approx(25, rel=0.05) and {
        r.output_len for r in one
    } == {5}
    gaps = np.diff([r.time for r in one if r.time < 600])
    assert gaps.std() / gaps.mean() == pytest.approx(2**0.5, rel=0.15), "of a gamma distribution of shape 0.5"
    assert {(r.input_len, r.output_len) for r in two} == {(7, 8)}


@pytest.mark.parametrize(
    "rates, problem",
    [
        (
            "0,0,1,1,Pareto,1,1\n",
            r"rates\.csv:2: rate 1 with gaps 'Pareto' of shape 1: expected Gamma or Weibull",
        ),
        ("0,600,1,1,Gamma,1,1\n0,0,1,1,Gamma,1,1\n", r"rates\.csv:3: window_start_s 0 runs backwards"),
        ("5,0,1,1,Gamma,1,1\n", r"holds no lengths of client 5"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(tmp_path, rates, problem):
    with pytest.raises(WorkloadError, match=problem):
        list(mix(tmp_path, rates).read())


# ---- a table of one's own --------------------------------------------------------------------------------

TABLE = "when;ignored,when,prompt,answer,who,prefix\n,1500,600,3,ann,1 2 3\n,2000,640,4,bob,1 2 4\n"


def test_columns_of_a_table_are_named_by_the_user(tmp_path, capsys):
    path = file_of(tmp_path, TABLE.rstrip(), name="mine.csv")
    words = [
        "time=when",
        "unit=ms",
        "input=prompt",
        "output=answer",
        "client=who",
        "blocks=prefix",
        "block_size=256",
    ]
    found = measured(path, capsys, *words)
    assert (found["format"], found["clients"], found["span_s"], found["rate"]) == ("table", 2, 0.5, 4.0)
    assert found["reuse"]["infinite_hit_rate"] == pytest.approx(512 / 1240)
    arrivals = list(
        Trace(path=path, time="when", unit="ms", input="prompt", output="answer", client="who").arrivals(
            0, VOCAB, CONTEXT
        )
    )
    assert [(a.time, len(a.prompt_token_ids), a.output_len, a.tags.client) for a in arrivals] == [
        (0, 600, 3, "ann"),
        (0.5, 640, 4, "bob"),
    ]


def test_a_table_may_be_json_lines_with_dates_and_nested_keys(tmp_path):
    lines = [
        {"at": "2026-01-01T00:00:00.5Z", "usage": {"in": 33, "out": 2}, "talk": 7, "ids": ["a", "b"]},
        {"at": "2026-01-01T00:00:01.0Z", "usage": {"in": 34, "out": 2}, "talk": 7, "ids": ["a", "b", "c"]},
    ]
    named = {
        "time": "at",
        "input": "usage.in",
        "output": "usage.out",
        "session": "talk",
        "blocks": "ids",
        "block_size": 16,
    }
    trace = Trace(path=file_of(tmp_path, *lines), **named)
    assert [r.session for r in trace.read()] == ["7", "7"]
    outputs = run(trace).outputs
    assert [o.num_cached_tokens for o in outputs] == [0, 32]
    assert outputs[1].arrival_time == pytest.approx(0.5)


@pytest.mark.parametrize(
    "text, words, problem",
    [
        (TABLE, ["time=when", "input=prompt"], "give output=COLUMN"),
        (TABLE, ["time=when", "input=promt", "output=answer"], r":1: there is no column 'promt'. Did you"),
        (TABLE, ["time=when", "input=prompt", "output=answer", "blocks=prefix"], "needs block_size=TOKENS"),
        (
            TABLE,
            ["time=when", "input=prompt", "output=answer", "blocks=prefix", "block_size=16"],
            r":2: 3 prefix of 16 tokens contradict 600 input tokens: expected 37, or 38",
        ),
        (TABLE, ["time=who", "input=prompt", "output=answer"], r":2: who 'ann': expected a finite number"),
        (TABLE, ["time=when", "input=who", "output=answer"], r":2: who 'ann': expected a whole number"),
        (
            TABLE,
            ["time=when", "unit=h", "input=prompt", "output=answer"],
            "unit='h': expected one of s, ms, us, ns",
        ),
        (TABLE, ["tim=when"], "tim=when: expected parameter=VALUE. Did you mean time"),
        (TABLE, ["limit=many"], "limit=many: expected a whole number"),
        (TABLE, [], r":1: no known format has the columns when;ignored, when, prompt, answer, who, prefix"),
        ('{"a": 1}\n', [], r":1: no known format has the keys a: give format="),
        ('{"a": 1}\n', ["time=a", "input=b", "output=a"], r":1: there is no key 'b'"),
        ("\n", [], "holds no request"),
    ],
)
def test_a_table_that_is_not_what_its_reader_says_is_refused(tmp_path, capsys, text, words, problem):
    path = file_of(tmp_path, text.rstrip("\n"), name="mine.csv")
    assert cli.main(["trace", path, *words]) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_a_run_says_which_format_it_guessed(tmp_path):
    assert Trace(path=file_of(tmp_path, moon(0, 5, [1]))).format_found() == "mooncake"
    assert Trace(path=file_of(tmp_path, CHATS[0])).format_found() == "qwen_bailian"
    assert Trace(path=file_of(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens")).format_found() == "azure"
    assert (
        Trace(path=file_of(tmp_path, "Timestamp,Model,Request tokens,Response tokens")).format_found()
        == "burstgpt"
    )
