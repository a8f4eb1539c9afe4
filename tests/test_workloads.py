"""Workloads: what each promises about lengths, times, sharing and repeatability, and what bad input is
told."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import statistics
import tracemalloc
from dataclasses import dataclass
from itertools import islice, pairwise

import pytest
from helpers.roles import default_roles

from core.cli import main as cli
from core.compose.config import EngineConfig, Hardware, ModelShape
from core.engine import Engine
from core.errors import ConfigError, WorkloadError
from plugins.executors.sim import SimExecutor
from plugins.workloads.agents import Agents
from plugins.workloads.chat import PROMPTS, Chat
from plugins.workloads.clients import Clients
from plugins.workloads.content import Content, only_its_length
from plugins.workloads.multi_turn import MultiTurn
from plugins.workloads.nano_bench import NanoBench
from plugins.workloads.pace import LONGEST, arrival_times, finite
from plugins.workloads.random_lengths import RandomLengths
from plugins.workloads.shared_prefix import SharedPrefix
from plugins.workloads.trace import Azure, BurstGPT, Mooncake, Trace

VOCAB, CONTEXT = 1000, 4096


def made(workload, seed: int = 0, vocab: int = VOCAB, context: int = CONTEXT) -> list:
    return list(workload.arrivals(seed, vocab, context))


def run(workload, seed: int = 0, context: int = CONTEXT, **config):
    executor = SimExecutor()
    executor.prepare(ModelShape("LlamaForCausalLM", 64, 2, 4, 2, 16, 128, VOCAB, True, context), Hardware())
    engine = Engine(
        default_roles(executor=executor), EngineConfig(**{"num_blocks": 2000, **config}), seed=seed
    )
    return engine.run(workload.arrivals(seed, VOCAB, engine.max_model_len), workload.on_result)


def most_at_once(outputs) -> int:
    """The most requests that were in the system at any time; one that leaves makes room for one that comes
    then."""
    events = sorted([(o.arrival_time, 1) for o in outputs] + [(o.finish_time, -1) for o in outputs])
    level = peak = 0
    for _, change in events:
        level += change
        peak = max(peak, level)
    return peak


# ---- what every workload promises ------------------------------------------------------------------------


@pytest.fixture
def mooncake_file(tmp_path):
    file = tmp_path / "trace.jsonl"
    rows = [(0, 1300, 5, [0, 1, 2]), (3000, 1025, 7, [0, 1, 3]), (3000, 512, 2, [0]), (9000, 700, 9, [4, 5])]
    file.write_text(
        "".join(
            json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": h}) + "\n"
            for t, i, o, h in rows
        )
    )
    return file


@pytest.fixture(
    params=[
        "random",
        "nano_bench",
        "shared_prefix",
        "multi_turn",
        "clients",
        "mooncake",
        "poisson",
        "gamma",
        "uniform",
    ]
)
def workload_of(request, mooncake_file):
    return {
        "random": lambda: RandomLengths(input_len=[5, 90], output_len=[1, 9]),
        "nano_bench": lambda: NanoBench(num_requests=8),
        "shared_prefix": lambda: SharedPrefix(groups=3),
        "multi_turn": lambda: MultiTurn(arrival="poisson"),
        "clients": lambda: Clients(duration=10),
        "mooncake": lambda: Mooncake(path=str(mooncake_file)),
        "poisson": lambda: RandomLengths(arrival="poisson", rate=9),
        "gamma": lambda: RandomLengths(arrival="gamma", rate=9, burstiness=0.5),
        "uniform": lambda: RandomLengths(arrival="uniform", rate=9),
    }[request.param]


def test_arrivals_come_in_order_of_time_with_tokens_of_the_vocabulary(workload_of):
    arrivals = made(workload_of())
    assert arrivals and all(a.time <= b.time for a, b in pairwise(arrivals))
    assert all(0 <= token < VOCAB for a in arrivals for token in a.prompt_token_ids)


def test_the_same_seed_gives_the_same_requests_and_another_seed_others(workload_of):
    assert made(workload_of()) == made(workload_of())
    if not isinstance(workload_of(), NanoBench):
        assert made(workload_of()) != made(workload_of(), seed=1)


def test_a_second_run_of_one_object_repeats_the_first(workload_of):
    workload = workload_of()
    assert made(workload) == made(workload)


def test_declared_caps_do_not_reveal_the_true_length(workload_of):
    declares = isinstance(workload_of(), NanoBench)  # that benchmark does
    assert all(
        (a.sampling.max_tokens is None) != declares and (a.output_len is None) == declares
        for a in made(workload_of())
    )


def test_an_empty_workload_is_an_error():
    for build in (
        lambda: RandomLengths(num_requests=0),
        lambda: SharedPrefix(num_requests=0),
        lambda: MultiTurn(num_sessions=0),
    ):
        with pytest.raises(ConfigError, match="expected at least 1"):
            build()

    @dataclass
    class Nothing(RandomLengths):
        def requests(self, seed, vocab_size, max_model_len):
            return iter(())

    with pytest.raises(WorkloadError, match="is empty"):
        made(Nothing())


# ---- arrival processes -----------------------------------------------------------------------------------


def gaps_of(**parameters) -> list[float]:
    times = [a.time for a in made(RandomLengths(num_requests=4000, input_len=1, output_len=1, **parameters))]
    return [b - a for a, b in pairwise(times)]


def test_all_at_once_is_at_time_zero():
    assert {a.time for a in made(RandomLengths())} == {0.0}


def test_uniform_is_evenly_spaced():
    assert gaps_of(arrival="uniform", rate=4) == pytest.approx([0.25] * 3999)


@pytest.mark.parametrize(
    "arrival, burstiness", [("poisson", 1.0), ("gamma", 1.0), ("gamma", 0.25), ("gamma", 4.0)]
)
def test_poisson_and_gamma_have_the_asked_rate_and_variation(arrival, burstiness):
    gaps = gaps_of(arrival=arrival, rate=5.0, burstiness=burstiness)
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.1)


def test_the_same_requests_come_at_every_rate():
    def prompts(**p):
        return [a.prompt_token_ids for a in made(RandomLengths(input_len=[1, 50], **p))]

    assert prompts() == prompts(arrival="poisson", rate=3) == prompts(arrival="gamma", rate=30, burstiness=2)


def test_a_closed_loop_keeps_its_concurrency_to_the_end():
    outputs = run(RandomLengths(arrival="closed", concurrency=5, num_requests=40, output_len=[3, 30])).outputs
    assert len(outputs) == 40
    assert most_at_once(outputs) == 5
    assert all(later.arrival_time in {o.finish_time for o in outputs} for later in outputs[5:])


def test_a_refused_request_does_not_cost_a_closed_loop_its_client():
    outputs = run(
        RandomLengths(arrival="closed", concurrency=2, num_requests=30, input_len=[50, 150]), context=100
    ).outputs
    assert len(outputs) == 30
    assert {o.state for o in outputs} == {"finished", "rejected"}


@pytest.mark.parametrize(
    "parameters, match",
    [
        ({"arrival": "poison"}, "poison.*Did you mean poisson"),
        ({"arrival": "replay"}, "replay"),
        ({"rate": 0}, "rate=0"),
        ({"burstiness": -1}, "burstiness=-1"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"input_len": 0}, "input_len=0"),
        ({"output_len": -3}, "output_len=-3"),
        ({"input_len": "long"}, "input_len='long'"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
def test_parameters_out_of_range_are_named(parameters, match):
    with pytest.raises(ConfigError, match=match):
        RandomLengths(**parameters)


def test_a_range_that_ends_before_it_begins_is_named():
    with pytest.raises(WorkloadError, match=r"input_len=\[9, 3\]"):
        RandomLengths(input_len=[9, 3])


@pytest.mark.parametrize(
    "parameters, named",
    [
        ({"arrival": "gamma", "burstiness": 1e308}, "burstiness=1e\\+308"),
        ({"arrival": "gamma", "burstiness": float("nan")}, "burstiness=nan"),
        ({"arrival": "gamma", "burstiness": 1e-300}, "burstiness=1e-300"),
        ({"arrival": "poisson", "rate": float("inf")}, "rate=inf"),
        ({"arrival": "uniform", "rate": 1e-320}, "rate="),
    ],
)
def test_arrival_processes_refuse_what_gives_no_finite_times(parameters, named):
    with pytest.raises(ConfigError, match=f"workload.{named}"):
        RandomLengths(**parameters)
    with pytest.raises(WorkloadError, match=f"workload.{named}"):
        next(
            arrival_times(
                **{"arrival": "", "rate": 1.0, "burstiness": 1.0, "rng": random.Random(0)} | parameters
            )
        )


def test_a_time_that_is_not_finite_names_what_it_follows_from():
    with pytest.raises(WorkloadError, match=r"workload.rate=0.5: a request would arrive at inf seconds"):
        finite(float("inf"), rate=0.5)
    for process in ("uniform", "poisson", "gamma"):
        ends = (1e-6, 1e6) if process != "gamma" else (1e-3, 1e6)  # of the ranges that workloads declare
        for end in ends:
            times = list(islice(arrival_times(process, 1.0 / end, end, random.Random(0)), 200))
            assert times == sorted(times) and all(map(math.isfinite, times))


# ---- synthetic requests ----------------------------------------------------------------------------------


def test_random_lengths_stay_within_their_ranges_and_reach_both_ends():
    arrivals = made(
        RandomLengths(num_requests=300, input_len=[3, 9], output_len=[2, 5], clients=3, priorities=2)
    )
    assert {len(a.prompt_token_ids) for a in arrivals} == set(range(3, 10))
    assert {a.output_len for a in arrivals} == set(range(2, 6))
    assert {a.tags.client for a in arrivals} == {"c0", "c1", "c2"} and {
        a.tags.priority for a in arrivals
    } == {0, 1}


def test_nano_bench_is_the_peers_benchmark_token_for_token():
    random.seed(0)  # as the benchmark itself does
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    arrivals = made(NanoBench(), seed=7, vocab=151936)
    assert [a.prompt_token_ids for a in arrivals] == prompts
    assert [a.sampling.max_tokens for a in arrivals] == lengths
    assert all(a.sampling.ignore_eos and a.sampling.temperature == 0.6 for a in arrivals)
    assert (sum(map(len, prompts)), sum(lengths)) == (142_827, 133_966)


def test_a_repeat_of_nano_bench_shares_no_token_position():
    first, second = (
        made(NanoBench(num_requests=4), vocab=151936),
        made(NanoBench(num_requests=4, repeat=1), vocab=151936),
    )
    assert all(
        x != y
        for a, b in zip(first, second, strict=True)
        for x, y in zip(a.prompt_token_ids, b.prompt_token_ids, strict=True)
    )


def test_shared_prefix_is_70_of_100_requests_sharing_410_of_512_tokens():
    arrivals = made(SharedPrefix())
    prefixes = [tuple(a.prompt_token_ids[:410]) for a in arrivals]
    common = max(set(prefixes), key=prefixes.count)
    assert prefixes.count(common) == 70 and len(set(prefixes)) == 31
    assert len({tuple(a.prompt_token_ids[:420]) for a in arrivals}) == 100
    assert {len(a.prompt_token_ids) for a in arrivals} == {512}


def test_shared_prefix_hits_the_cache_in_whole_blocks():
    outputs = run(SharedPrefix(arrival="uniform", rate=10), block_size=16).outputs
    assert sum(o.num_cached_tokens for o in outputs) == 69 * (410 // 16 * 16)


def test_groups_share_among_themselves_only():
    arrivals = made(SharedPrefix(groups=4, share_requests=1.0, share_prompt=0.5, num_requests=40))
    by_prefix: dict[tuple, set] = {}
    for a in arrivals:
        by_prefix.setdefault(tuple(a.prompt_token_ids[:256]), set()).add(a.tags.category)
    assert sorted(map(len, by_prefix.values())) == [1] * 4


def test_clients_come_at_their_own_rates_evenly_spaced():
    arrivals = made(Clients(duration=20))
    times = {name: [a.time for a in arrivals if a.tags.client == name] for name in ("client0", "client1")}
    assert [len(t) for t in times.values()] == [30, 60]
    assert times["client1"][:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert {(len(a.prompt_token_ids), a.output_len) for a in arrivals} == {(256, 256)}
    assert len({a.id for a in arrivals}) == 90


def test_clients_need_one_length_each_or_one_for_all():
    with pytest.raises(WorkloadError, match="expected one entry, or one for each of the 2 clients"):
        Clients(input_lens=[1, 2, 3])
    arrivals = made(Clients(rates=[1, 1, 1], duration=3, input_lens=[[5, 6], 7, 8], output_lens=[2]))
    assert {(a.tags.client, len(a.prompt_token_ids) in (5, 6)) for a in arrivals} == {
        ("client0", True),
        ("client1", False),
        ("client2", False),
    }


# ---- conversations ---------------------------------------------------------------------------------------


def test_a_turn_is_the_whole_talk_so_far_and_comes_after_the_answer():
    workload = MultiTurn(num_sessions=3, turns=3, system_len=10, input_len=[5, 8], output_len=[4, 6])
    seen: dict[str, list] = {}
    first = made(workload)
    workload.arrivals(0, VOCAB, CONTEXT)
    follow = workload.on_result

    def remember(request, now):
        following = list(follow(request, now))
        for a in following:
            assert a.time >= now
            seen.setdefault(a.tags.session, []).append((list(request.token_ids), a))
        return following

    workload.on_result = remember
    outputs = run(workload).outputs
    assert len(outputs) == 9 and {o.tags.turn for o in outputs} == {0, 1, 2}
    assert len({tuple(a.prompt_token_ids[:10]) for a in first}) == 1, (
        "conversations begin with one system prompt"
    )
    for turns in seen.values():
        for before, a in turns:
            assert a.prompt_token_ids[: len(before)] == before
            assert 5 <= len(a.prompt_token_ids) - len(before) <= 8


def test_what_a_conversation_asks_does_not_depend_on_the_order_of_answers():
    def lengths(**p):
        return {
            o.id: (o.num_prompt_tokens, len(o.output_token_ids))
            for o in run(MultiTurn(turns=[1, 5], input_len=[3, 9], **p)).outputs
        }

    assert lengths() == lengths(arrival="poisson", rate=50) == lengths(arrival="closed", concurrency=2)


def test_a_closed_loop_of_conversations_keeps_so_many_going():
    outputs = run(MultiTurn(arrival="closed", concurrency=3, num_sessions=10, turns=[1, 4])).outputs
    assert {o.tags.session for o in outputs} == {f"s{i}" for i in range(10)}
    assert most_at_once(outputs) <= 3


def test_a_conversation_ends_where_the_context_does():
    outputs = run(MultiTurn(num_sessions=2, turns=50, input_len=20, output_len=20), context=256).outputs
    assert all(o.state == "finished" for o in outputs)
    assert 2 < max(o.tags.turn for o in outputs) < 10


# ---- agents ----------------------------------------------------------------------------------------------


def agents_file(tmp_path, sessions: int = 3) -> str:
    calls = [
        {"t": 0.0, "type": "n", "in": 130, "out": 16, "hash_ids": [1, 2], "stop": "tool_use"},
        {
            "t": 3.0,
            "type": "subagent",
            "requests": [
                {"type": "n", "in": 70, "out": 8, "hash_ids": [9], "stop": "end_turn", "think_time": 2.0}
            ],
        },
        {
            "t": 9.0,
            "type": "s",
            "in": 200,
            "out": 32,
            "hash_ids": [1, 2, 3],
            "stop": "end_turn",
            "think_time": 5.0,
        },
    ]
    lines = [json.dumps({"id": f"trace{i}", "block_size": 64, "requests": calls}) for i in range(sessions)]
    return file_of(tmp_path, "\n".join(lines), "agents.jsonl")


def test_agent_calls_follow_the_answer_and_the_tool_and_reuse_their_own_prefix(tmp_path):
    outputs = run(Agents(path=agents_file(tmp_path)), block_size=16).outputs
    by_id = {o.id: o for o in outputs}
    assert len(by_id) == 9
    for i in range(3):
        first, sub, last = (by_id[f"trace{i}.{turn}"] for turn in range(3))
        assert (sub.arrival_time, last.arrival_time) == pytest.approx(
            (first.finish_time + 2, sub.finish_time + 5)
        )
        assert [o.num_cached_tokens for o in (first, sub, last)] == [0, 0, 128], (
            "ids are local to the session"
        )
        assert [o.tags.tool for o in (first, sub, last)] == ["tool", "", ""]
        assert [o.tags.parents for o in (first, sub, last)] == [(), (first.id,), (sub.id,)]
        assert [o.tags.last for o in (first, sub, last)] == [False, False, True]


def test_agent_sessions_are_scaled_and_end_with_the_context(tmp_path):
    path = agents_file(tmp_path)
    scaled = run(Agents(path=path, scale=0.5, think_scale=0), block_size=16).outputs
    assert sorted({(o.num_prompt_tokens, len(o.output_token_ids)) for o in scaled}) == [
        (35, 4),
        (65, 8),
        (100, 16),
    ]
    cut = run(Agents(path=path), context=180).outputs
    assert {o.tags.turn for o in cut} == {0, 1} and {o.state for o in cut} == {"finished"}


@pytest.mark.parametrize(
    "line, match",
    [
        ("{", "no agent session"),
        ('{"id": "a"}', "lacks 'requests'"),
        (
            '{"id": "a", "block_size": 64, "requests": [{"type": "n", "in": -1, "out": 1, "hash_ids": []}]}',
            "in -1 is negative",
        ),
    ],
)
def test_a_broken_agent_session_is_named_by_file_and_line(tmp_path, line, match):
    path = agents_file(tmp_path, sessions=1)
    with open(path, "a") as file:
        file.write("\n" + line)
    with pytest.raises(WorkloadError, match=rf"agents\.jsonl:2: .*{match}"):
        made(Agents(path=path))


def test_a_session_id_given_twice_is_refused(tmp_path):
    line = json.dumps(
        {"id": "a", "block_size": 64, "requests": [{"type": "n", "in": 70, "out": 8, "hash_ids": [1]}]}
    )
    with pytest.raises(WorkloadError, match=r"twice\.jsonl:3: session id 'a' is that of line 1 too"):
        made(Agents(path=file_of(tmp_path, f"{line}\n\n{line}\n", "twice.jsonl")))


# ---- chat ------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of the least kind."""

    has_chat_template = False

    def encode(self, text):
        return [len(word) for word in text.split()]


class Templated(Words):
    has_chat_template = True

    def encode_chat(self, messages):
        return self.encode(" ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>")


def chat(tokenizer=None, **parameters) -> Chat:
    workload = Chat(**parameters)
    workload.tokenizer = tokenizer or Words()
    return workload


def test_chat_asks_each_prompt_once_and_lets_the_model_end_the_answer():
    arrivals = made(chat())
    assert [a.prompt for a in arrivals] == list(PROMPTS)
    assert all(a.output_len is None and a.sampling.max_tokens == 64 for a in arrivals)
    assert [a.prompt for a in made(chat(num_requests=20))] == [*PROMPTS, *PROMPTS[:4]]


def test_chat_uses_the_models_template_and_system_message():
    arrival = made(chat(Templated(), system="Be brief.", num_requests=1))[0]
    assert arrival.prompt_token_ids == Words().encode(f"<system> Be brief. <user> {PROMPTS[0]} <assistant>")


def test_chat_reads_prompts_from_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\nthree\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "one two"}\n{"prompt": "three"}\n')
    assert [a.prompt for a in made(chat(path=str(tmp_path / "a.txt")))] == ["one two", "three"]
    assert [a.prompt for a in made(chat(path=str(tmp_path / "b.jsonl")))] == ["one two", "three"]


def test_chat_says_what_it_lacks(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(WorkloadError, match="needs the model's tokenizer"):
        made(Chat())
    with pytest.raises(WorkloadError, match=r"bad\.jsonl:2: expected"):
        made(chat(path=str(tmp_path / "bad.jsonl")))
    with pytest.raises(WorkloadError, match=r"empty\.txt: holds no prompt"):
        made(chat(path=str(tmp_path / "empty.txt")))
    with pytest.raises(WorkloadError, match="no such file"):
        made(chat(path=str(tmp_path / "none.txt")))


# ---- traces ----------------------------------------------------------------------------------------------

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 "
    "18:15:50.9951690,396,109\n"
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation "
    "log\n45.5,GPT-4,10,230,240,API log\n"
)


def file_of(tmp_path, text: str, name: str = "trace.csv") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_azure_times_start_at_zero_and_lengths_are_the_columns(tmp_path):
    arrivals = made(Azure(path=file_of(tmp_path, AZURE)))
    assert [a.time for a in arrivals] == pytest.approx([0.0, 4.314579])
    assert [(len(a.prompt_token_ids), a.output_len) for a in arrivals] == [(374, 44), (396, 109)]
    assert arrivals[0].prompt_token_ids[0] != arrivals[1].prompt_token_ids[0], "no prefix is shared"


def test_azures_later_traces_have_a_time_zone(tmp_path):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 "
        "00:00:01+00:00,2,5\n"
    )
    assert made(Azure(path=file_of(tmp_path, text)))[1].time == pytest.approx(0.99007)


def test_burstgpt_columns_are_found_by_name(tmp_path):
    arrivals = made(BurstGPT(path=file_of(tmp_path, BURST)))
    assert [(a.time, len(a.prompt_token_ids), a.output_len) for a in arrivals] == [
        (0.0, 472, 18),
        (40.5, 10, 230),
    ]


def test_mooncake_block_ids_become_tokens_so_that_prefixes_are_real(mooncake_file):
    a, b, c, d = (r.prompt_token_ids for r in made(Mooncake(path=str(mooncake_file))))
    assert [len(p) for p in (a, b, c, d)] == [1300, 1025, 512, 700]
    assert a[:1024] == b[:1024] and a[1024] != b[1024] and c == a[:512]
    assert d[0] != a[0]


def test_mooncake_prefixes_hit_the_cache_of_the_engine(mooncake_file):
    outputs = run(Mooncake(path=str(mooncake_file)), block_size=16).outputs
    # the last prompt token is always computed
    assert [o.num_cached_tokens for o in outputs] == [0, 1024, 496, 0]


def test_a_trace_may_be_compressed_scaled_and_limited(tmp_path, mooncake_file):
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress(mooncake_file.read_bytes()))
    arrivals = made(Mooncake(path=str(packed), time_scale=0.5, limit=2))
    assert [a.time for a in arrivals] == [0.0, 1.5]


def test_long_prompts_are_the_engines_to_reject_unless_they_are_cut(mooncake_file):
    def states(**p):
        return [o.state for o in run(Mooncake(path=str(mooncake_file), **p), context=1100).outputs]

    assert states() == ["rejected", "finished", "finished", "finished"]
    assert states(max_input_len=1000) == ["finished"] * 4
    cut = made(Mooncake(path=str(mooncake_file), max_input_len=600, max_output_len=6))
    assert [(len(a.prompt_token_ids), a.output_len) for a in cut] == [(600, 5), (600, 6), (512, 2), (600, 6)]


def test_a_trace_can_come_at_another_pace(mooncake_file):
    outputs = run(Mooncake(path=str(mooncake_file), arrival="closed", concurrency=1)).outputs
    assert most_at_once(outputs) == 1
    times = [a.time for a in made(Mooncake(path=str(mooncake_file), arrival="uniform", rate=2))]
    assert times == [0.0, 0.5, 1.0, 1.5]


def test_rows_out_of_order_are_sorted(tmp_path):
    lines = AZURE.splitlines()
    arrivals = made(Azure(path=file_of(tmp_path, "\n".join([lines[0], lines[2], lines[1]]))))
    assert [a.output_len for a in arrivals] == [44, 109]


def test_zero_lengths_cost_only_their_own_request(tmp_path):
    outputs = run(
        Azure(path=file_of(tmp_path, AZURE + "2023-11-16 18:16:00.0,0,5\n2023-11-16 18:16:01.0,5,0\n"))
    ).outputs
    assert [o.state for o in outputs] == ["finished", "finished", "rejected", "rejected"]
    assert "empty prompt" in outputs[2].finish_reason and "output length 0" in outputs[3].finish_reason


@pytest.mark.parametrize(
    "workload, text, match",
    [
        (Azure, AZURE + "2023-11-16 18:15:51.0,12\n", r":4: 2 cells"),
        (Azure, AZURE + "2023-11-16 18:15:51.0,12,many\n", r":4: GeneratedTokens 'many'"),
        (Azure, AZURE + "2023-11-16 18:15:51.0,-1,3\n", r":4: ContextTokens -1"),
        (Azure, AZURE + "2023-11-16 18:15:51.0,1.5,3\n", r":4: ContextTokens '1\.5'"),
        (Azure, AZURE + "yesterday,1,3\n", r":4: TIMESTAMP 'yesterday'"),
        (Azure, "time,in,out\n", r":1: the header lacks TIMESTAMP"),
        (Azure, "TIMESTAMP,ContextTokens,GeneratedTokens\n", r"holds no request"),
        (Azure, "", r"holds no request"),
        (BurstGPT, BURST + "nan,ChatGPT,1,1,2,x\n", r":4: Timestamp 'nan'"),
        (
            Mooncake,
            '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n{"timestamp"\n',
            r":2: no JSON",
        ),
        (Mooncake, '{"timestamp": 0, "input_length": 5, "hash_ids": [1]}\n', r":1: lacks 'output_length'"),
        (
            Mooncake,
            '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}\n',
            r":1: 1 hash_ids .* do not cover",
        ),
        (
            Mooncake,
            '{"timestamp": 0, "input_length": -5, "output_length": 1, "hash_ids": [1]}\n',
            r":1: input_length -5",
        ),
        (
            Mooncake,
            '{"timestamp": 0, "input_length": 5, "output_length": -1, "hash_ids": [1]}\n',
            r":1: output_length -1",
        ),
        (
            Mooncake,
            '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}\n',
            r":1: hash_ids",
        ),
        (Mooncake, "[1, 2]\n", r":1: expected one JSON object a line"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path, workload, text, match):
    path = file_of(tmp_path, text)
    with pytest.raises(WorkloadError, match=rf"trace\.csv:? ?{match}"):
        workload(path=path).arrivals(0, VOCAB, CONTEXT)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.csv.gz").write_bytes(b"no gzip")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name, problem in (("broken.csv.gz", "cannot be read on"), ("binary.csv", "no UTF-8")):
        with pytest.raises(WorkloadError, match=rf"{name}:1: {problem}"):
            made(Azure(path=str(tmp_path / name)))
    with pytest.raises(WorkloadError, match="no such file"):
        made(Azure(path=str(tmp_path / "none.csv")))
    with pytest.raises(WorkloadError, match="workload.path is not set"):
        made(Mooncake())
    with pytest.raises(ConfigError, match="Did you mean mooncake"):
        Trace(format="moncake")


# Lines as public files really have them. Each is read as its writer meant it, or refused with file and line;
# none is guessed at.
AZURE_HEAD, BURST_HEAD = AZURE.partition("\n")[0] + "\n", BURST.partition("\n")[0] + "\n"
NOON = "2024-05-10 12:00:00"


def moon(time="0", input_len="600", output_len="5", ids="[1, 2]") -> str:
    lengths = f'"input_length": {input_len}, "output_length": {output_len}'
    return f'{{"timestamp": {time}, {lengths}, "hash_ids": {ids}}}\n'


READ = {
    "byte-order mark and CRLF": (
        Azure,
        "\ufeff" + (AZURE_HEAD + f"{NOON},7,3\n").replace("\n", "\r\n"),
        [(0, 7, 3)],
    ),
    "CR alone": (Azure, (AZURE_HEAD + f"{NOON},7,3\n").replace("\n", "\r"), [(0, 7, 3)]),
    "UTC as Z": (
        Azure,
        AZURE_HEAD + "2024-05-10T12:00:00Z,7,3\n2024-05-10T12:00:00.25Z,7,3\n",
        [(0, 7, 3), (0.25, 7, 3)],
    ),
    "two zones": (
        Azure,
        AZURE_HEAD + f"{NOON}+00:00,7,3\n2024-05-10 05:00:01.5-07:00,8,3\n",
        [(0, 7, 3), (1.5, 8, 3)],
    ),
    "100 ns": (
        Azure,
        AZURE_HEAD + f"{NOON}.0000001,7,3\n{NOON}.5000002,7,3\n",
        [(0, 7, 3), (0.5000001, 7, 3)],
    ),
    "counts as floats": (Azure, AZURE_HEAD + f"{NOON},7.0,3.0\n", [(0, 7, 3)]),
    "quoted cells": (Azure, AZURE_HEAD + f'"{NOON}","7","3"\n', [(0, 7, 3)]),
    "more columns": (Azure, f"NumImages,{AZURE_HEAD}1,{NOON},7,3\n", [(0, 7, 3)]),
    "blank lines at the end": (Azure, AZURE_HEAD + f"{NOON},7,3\n\n  \n", [(0, 7, 3)]),
    "spaces after commas": (
        BurstGPT,
        (BURST_HEAD + "5,GPT-4,7,3,10,API log\n").replace(",", ", "),
        [(0, 7, 3)],
    ),
    "a session column": (BurstGPT, f"Session ID,{BURST_HEAD},5.0,GPT-4,7.0,3.0,10.0,API log\n", [(0, 7, 3)]),
    "a failed request": (
        BurstGPT,
        BURST_HEAD + "5,GPT-4,7,0,7,API log\n6,GPT-4,8,3,11,API log\n",
        [(0, 7, 0), (1, 8, 3)],
    ),
    "equal times keep their order": (Mooncake, moon() + moon(input_len="601"), [(0, 600, 5), (0, 601, 5)]),
    "numbers as text and as floats": (Mooncake, moon('"1000"', "600.0", "5e0"), [(0, 600, 5)]),
    "times before zero": (Mooncake, moon("-3000") + moon(), [(0, 600, 5), (3, 600, 5)]),
    "no tokens": (Mooncake, moon(input_len="0", ids="[]"), [(0, 0, 5)]),
    "ids of 64 bits and more": (Mooncake, moon(ids=f"[{2**64 - 1}, {2**90}]"), [(0, 600, 5)]),
}
REFUSED = {
    "a zone on some lines only": (
        Azure,
        AZURE_HEAD + f"{NOON},7,3\n{NOON}Z,7,3\n",
        ":3: .* has a time zone, unlike",
    ),
    "a day without a time": (Azure, AZURE_HEAD + "2024-05-10,7,3\n", ":2: TIMESTAMP"),
    "seconds since 1970": (Azure, AZURE_HEAD + "1700158623.98,7,3\n", ":2: TIMESTAMP"),
    "a 30th of February": (Azure, AZURE_HEAD + "2024-02-30 12:00:00,7,3\n", ":2: TIMESTAMP"),
    "a fraction with an exponent": (Azure, AZURE_HEAD + f"{NOON}.1e5,7,3\n", ":2: TIMESTAMP"),
    "underscores": (Azure, AZURE_HEAD + f"{NOON},1_0,3\n", ":2: ContextTokens '1_0'"),
    "thousands": (Azure, AZURE_HEAD + f'{NOON},"1,472",3\n', ":2: ContextTokens '1,472'"),
    "an empty cell": (Azure, AZURE_HEAD + f"{NOON},,3\n", ":2: ContextTokens ''"),
    "a comma too many": (Azure, AZURE_HEAD + f"{NOON},7,3,\n", ":2: 4 cells"),
    "semicolons": (Azure, AZURE_HEAD.replace(",", ";"), ":1: the header lacks"),
    "a column twice": (
        Azure,
        f"ContextTokens,{AZURE_HEAD}",
        ":1: the header has ContextTokens more than once",
    ),
    "an open quote": (Azure, AZURE_HEAD + f'"{NOON},7,3\n', ":2: no line of a CSV file"),
    "a cell beyond all bounds": (Azure, AZURE_HEAD + f"{NOON},{'9' * 200_000},3\n", ":2: "),
    "more tokens than can be": (Azure, AZURE_HEAD + f"{NOON},{10**13},3\n", ":2: ContextTokens .*at most"),
    "a NUL byte": (Azure, AZURE_HEAD + f"{NOON},7\0,3\n", ":2: a NUL byte at column 22"),
    "nanoseconds": (BurstGPT, BURST_HEAD + f"{10**18},GPT-4,7,3,10,x\n", ":2: Timestamp"),
    "infinity": (BurstGPT, BURST_HEAD + "inf,GPT-4,7,3,10,x\n", ":2: Timestamp 'inf'"),
    "one array of all": (Mooncake, f"[{moon().strip()}]\n", ":1: expected one JSON object a line"),
    "true for a number": (Mooncake, moon(output_len="true"), ":1: output_length True"),
    "true for an id": (Mooncake, moon(ids="[true, false]"), ":1: hash_ids"),
    "an id that is no whole number": (Mooncake, moon(ids="[1.0, 2.0]"), ":1: hash_ids"),
    "ids of other blocks": (
        Mooncake,
        moon(ids="[1, 2, 3]"),
        ":1: 3 hash_ids .* are too many for input_length 600: expected 2",
    ),
    "a time that is NaN": (Mooncake, moon("NaN"), ":1: timestamp nan"),
    "a time that is null": (Mooncake, moon("null"), ":1: timestamp None"),
    "a length beyond floats": (Mooncake, moon(input_len="1e400"), ":1: input_length inf"),
    "a number of thousands of digits": (Mooncake, moon(input_len="1" * 5000), ":1: no JSON that can be read"),
    "half a letter": (Mooncake, moon(ids='"\\ud800"'), r":1: no text: \\ud800 is one half of a letter"),
    "brackets without end": (Mooncake, "[" * 200_000, ":1: no JSON that can be read"),
}


@pytest.mark.parametrize("workload, text, expected", READ.values(), ids=READ)
def test_lines_of_public_files_are_read_as_they_were_meant(tmp_path, workload, text, expected):
    (tmp_path / "trace").write_bytes(text.encode())
    arrivals = made(workload(path=str(tmp_path / "trace")))
    assert [(len(a.prompt_token_ids), a.output_len) for a in arrivals] == [row[1:] for row in expected]
    assert [a.time for a in arrivals] == pytest.approx([row[0] for row in expected], abs=2e-7)


@pytest.mark.parametrize("workload, text, match", REFUSED.values(), ids=REFUSED)
def test_lines_that_could_be_misread_are_refused_by_file_and_line(tmp_path, workload, text, match):
    (tmp_path / "trace").write_bytes(text.encode())
    with pytest.raises(WorkloadError, match=f"trace{match}"):
        made(workload(path=str(tmp_path / "trace")))


@pytest.mark.parametrize("vocab", [2, 512, 32_768, 151_936])
def test_distinct_ids_give_distinct_prompts_however_wide_they_are(tmp_path, vocab):
    ids = [
        [(group << shift) + 1, (group << shift) + 2]
        for shift in (0, 32, 40, 45, 56, 70)
        for group in (1, 2, vocab, vocab + 1)
    ]
    path = file_of(tmp_path, "".join(moon(input_len="600", ids=str(pair)) for pair in ids))
    prompts = {tuple(a.prompt_token_ids) for a in made(Mooncake(path=path), vocab=vocab)}
    assert len(prompts) == len({tuple(pair) for pair in ids})


READERS = {"trace": Mooncake, "agents": Agents, "chat": chat}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(WorkloadError, match="is no regular file"):
            made(READERS[reader](path=str(path)))
    for path in ("a" * 5000, "no\0name", "~nobody-of-this-name/x"):
        with pytest.raises(WorkloadError, match="workload.path="):
            made(READERS[reader](path=path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_line_that_never_ends_is_refused_before_it_is_in_memory(tmp_path, monkeypatch, reader, packed):
    monkeypatch.setattr("plugins.workloads.lines.LONGEST", 1000)
    monkeypatch.setattr("plugins.workloads.trace.LONGEST_ROW", 1000)
    data = b"\n" + b"0" * 5000
    (tmp_path / "long").write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(WorkloadError, match=r"long:2: the line is longer than"):
        made(READERS[reader](path=str(tmp_path / "long")))


def test_a_compressed_file_is_known_by_its_contents_and_named_where_it_breaks(tmp_path):
    packed = gzip.compress("".join(moon(str(i)) for i in range(5000)).encode())
    (tmp_path / "whole").write_bytes(packed)
    (tmp_path / "cut").write_bytes(packed[: len(packed) // 2])
    assert len(made(Mooncake(path=str(tmp_path / "whole")))) == 5000
    with pytest.raises(WorkloadError, match=r"cut:\d+: cannot be read on"):
        made(Mooncake(path=str(tmp_path / "cut")))


# ---- prompts that fit no context -------------------------------------------------------------------------

HUGE = 10**11  # tokens in a file
MOST = LONGEST  # tokens that a parameter may ask for


@pytest.fixture(params=["random", "clients", "shared_prefix", "multi_turn", "azure", "mooncake", "agents"])
def too_long(request, tmp_path):
    azure, ids = file_of(tmp_path, AZURE_HEAD + f"{NOON},{HUGE},3\n"), str(list(range(200_000)))
    call = {"in": HUGE, "out": 1, "hash_ids": [1]}
    agents = file_of(tmp_path, json.dumps({"id": "a", "block_size": 64, "requests": [call]}), "agents.jsonl")
    mooncake = file_of(tmp_path, moon(input_len=str(200_000 * 512), ids=ids), "mooncake.jsonl")
    return {
        "random": lambda: RandomLengths(input_len=MOST, num_requests=2),
        "clients": lambda: Clients(input_lens=[MOST], duration=1),
        "shared_prefix": lambda: SharedPrefix(input_len=MOST, num_requests=2),
        "multi_turn": lambda: MultiTurn(system_len=MOST, num_sessions=2),
        "azure": lambda: Azure(path=azure),
        "mooncake": lambda: Mooncake(path=mooncake),
        "agents": lambda: Agents(path=agents),
    }[request.param]()


def test_a_prompt_longer_than_the_context_is_rejected_by_its_length_and_never_made(too_long):
    tracemalloc.start()
    outputs = run(too_long).outputs
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outputs and {o.state for o in outputs} == {"rejected"}
    assert all(f"prompt of {o.num_prompt_tokens} tokens does not fit" in o.finish_reason for o in outputs)
    assert min(o.num_prompt_tokens for o in outputs) >= MOST and peak < 40e6, (
        "8 bytes per token would be 80 MB at least"
    )


@pytest.mark.parametrize("tokens", [10**13, 10**30])
def test_a_length_beyond_all_measure_is_refused(tokens):
    with pytest.raises(WorkloadError, match="expected at most 1,000,000,000,000"):
        only_its_length(tokens)


# ---- python -m headway trace -----------------------------------------------------------------------------


def test_a_trace_is_measured_in_one_pass_without_its_tokens(tmp_path, capsys):
    count, tokens = 1000, 100 * 512
    rows = (
        moon(str(1000 * (count - i)), str(tokens), "7", str(list(range(i, i + 100)))) for i in range(count)
    )
    path, out = file_of(tmp_path, "".join(rows), "trace.jsonl"), tmp_path / "lengths.jsonl"
    tracemalloc.start()
    assert cli.main(["trace", path, "--out", str(out)]) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    text = capsys.readouterr().out
    assert (
        "1,000 over 999.0 s, 1.00 a second" in text
        and f"{count * tokens:,} in all" in text
        and "variation 0.00" in text
    )
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(written) == count and written[1] == {"time": 1.0, "input_len": tokens, "output_len": 7}
    assert peak < 10e6, "51,200,000 tokens would be 400 MB"


def test_measuring_a_trace_names_what_is_wrong(tmp_path, capsys):
    path = file_of(tmp_path, moon() + "{", "trace.jsonl")
    for argv, problem in (
        ([path], "trace.jsonl:2: no JSON"),
        ([str(tmp_path / "none")], "no such file"),
        ([path, "--limit", "0"], "limit=0"),
        ([path, "--limit", "1", "--out", path], "is the trace itself"),
        ([path, "--limit", "1", "--out", str(tmp_path / "no" / "folder")], "cannot be written"),
    ):
        assert cli.main(["trace", *argv]) == 2
        assert problem in capsys.readouterr().err


# ---- tokens of ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2, 7, 1000, 151936])
def test_content_is_stable_and_tells_ids_apart_in_its_first_tokens(vocab):
    content = Content(3, vocab)
    head = 40 if vocab == 2 else 16
    ids = [*range(200), 1 << 20, (1 << 40) - 1]
    assert len({tuple(content.tokens(id, head)) for id in ids}) == len(ids)
    assert content.tokens(5, 900) == Content(3, vocab).tokens(5, 900)
    assert content.tokens(5, 900)[:100] == content.tokens(5, 100)
    assert all(0 <= token < vocab for token in content.tokens(12345, 2 * vocab + 5 if vocab < 100 else 50))


# ---- the hit-rate experiment -----------------------------------------------------------------------------


def test_hit_rates_of_a_trace_by_capacity_are_those_counted_by_hand(tmp_path):
    from experiments.mooncake_hit_rate import hit_rates

    lines = [
        json.dumps({"timestamp": i, "input_length": 600, "output_length": 1, "hash_ids": ids})
        for i, ids in enumerate([[0, 1], [0, 2], [0, 1]])
    ]
    rows = Mooncake(path=file_of(tmp_path, "\n".join(lines))).rows()
    # Two blocks: 0 stays, 1 and 2 push each other out. Without a limit the third request finds both of its
    # blocks.
    assert hit_rates(rows, 2) == pytest.approx((2 * 512 / 1800, 2 / 6))
    assert hit_rates(rows, 6) == pytest.approx(((512 + 600) / 1800, 3 / 6))
