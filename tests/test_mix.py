"""Clients, priorities and SLO tiers on every workload; the workload that `python run.py` runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.policy_runs import compose

from core.errors import WorkloadError
from core.measure.metrics import summarize
from core.measure.report import run_table
from headway import (
    SLO,
    Arrival,
    ConfigError,
    Request,
    RequestOutput,
    RequestState,
    RunResult,
    Tags,
    load_registry,
)
from plugins.workloads.agents import Agents
from plugins.workloads.demo import Demo
from plugins.workloads.mix import Mix
from plugins.workloads.multi_turn import MultiTurn
from plugins.workloads.random_lengths import RandomLengths
from plugins.workloads.shared_prefix import SharedPrefix

TIERS = [SLO(ttft=0.5), SLO(ttft=5.0, tpot=0.2)]


def arrivals(workload, seed: int = 1) -> list[Arrival]:
    return list(workload.arrivals(seed, 1000, 4096))


def test_every_workload_can_be_dealt():
    registry = load_registry()
    for name in registry.names("workload"):
        plugin = registry.get("workload", name)
        assert issubclass(plugin.config, Mix), name
        assert {"clients", "client_skew", "priorities", "slo_tiers", "slo_shares"} <= {
            f.name for f in plugin.parameters()
        }, name


@dataclass
class Three(Mix):
    """Three requests of one client with targets of their own, and three without."""

    def arrivals(self, seed, vocab_size, max_model_len):
        made = [Arrival(float(i), [1, 2], tags=Tags(client="own", priority=7)) for i in range(3)]
        made += [Arrival(float(i), [1, 2], slo=SLO(e2el=9.0)) for i in range(3, 6)]
        return list(self.mixed(made, seed))


def test_what_is_not_asked_for_stays_as_the_workload_says():
    made = arrivals(Three())
    assert {a.tags.client for a in made[:3]} == {"own"} and {a.tags.priority for a in made[:3]} == {7}
    made = arrivals(Three(slo_tiers=TIERS))
    assert all(a.slo in TIERS for a in made[:3]) and all(a.slo == SLO(e2el=9.0) for a in made[3:])
    assert {a.tags.client for a in made[:3]} == {"own"}


def test_clients_are_dealt_in_turn_or_with_a_skew():
    equal = arrivals(SharedPrefix(clients=3))
    assert [a.tags.client for a in equal[:4]] == ["c0", "c1", "c2", "c0"]
    skewed = Counter(
        a.tags.client
        for a in arrivals(SharedPrefix(num_requests=6000, input_len=4, clients=3, client_skew=1.0))
    )
    for k, share in enumerate((6 / 11, 3 / 11, 2 / 11)):
        assert skewed[f"c{k}"] / 6000 == pytest.approx(share, abs=0.03)


def test_priorities_and_tiers_are_uniform_and_change_nothing_else():
    plain = arrivals(SharedPrefix(num_requests=900, input_len=8))
    dealt = arrivals(SharedPrefix(num_requests=900, input_len=8, priorities=3, slo_tiers=TIERS))
    assert [a.prompt_token_ids for a in dealt] == [a.prompt_token_ids for a in plain]
    assert [a.output_len for a in dealt] == [a.output_len for a in plain]
    assert set(Counter(a.tags.priority for a in dealt)) == {0, 1, 2}
    assert all(250 < n < 350 for n in Counter(a.tags.priority for a in dealt).values())
    assert all(400 < n < 500 for n in Counter(a.slo for a in dealt).values())


def test_tiers_have_the_shares_that_they_are_given():
    made = arrivals(SharedPrefix(num_requests=3000, input_len=8, slo_tiers=TIERS, slo_shares=[1.0, 3.0]))
    counts = Counter(a.slo for a in made)
    assert [counts[tier] / 3000 for tier in TIERS] == pytest.approx([0.25, 0.75], abs=0.03)
    assert {a.slo for a in arrivals(SharedPrefix(slo_tiers=TIERS, slo_shares=[0.0, 2.0]))} == {TIERS[1]}


@pytest.mark.parametrize(("tiers", "shares"), [(2, [1.0]), (2, [0.0, 0.0]), (0, [1.0])])
def test_shares_that_are_not_those_of_the_tiers_are_refused(tiers, shares):
    with pytest.raises(WorkloadError, match=r"workload.slo_shares=\[.*expected one for each of the"):
        arrivals(SharedPrefix(slo_tiers=TIERS[:tiers], slo_shares=shares))


def test_one_choice_does_not_move_another():
    both = arrivals(SharedPrefix(priorities=3, slo_tiers=TIERS))
    assert [a.tags.priority for a in both] == [a.tags.priority for a in arrivals(SharedPrefix(priorities=3))]
    assert [a.slo for a in both] == [a.slo for a in arrivals(SharedPrefix(slo_tiers=TIERS))]
    assert [a.slo for a in both] != [a.slo for a in arrivals(SharedPrefix(slo_tiers=TIERS), seed=2)]


DEALT = {"clients": 4, "client_skew": 0.0, "priorities": 5, "slo_tiers": TIERS}


def sessions(folder: Path) -> str:
    call = {"type": "n", "in": 10, "out": 2, "hash_ids": [], "think_time": 0.5, "stop": "tool_use"}
    lines = [json.dumps({"id": f"a{i}", "block_size": 64, "requests": [call, call]}) for i in range(6)]
    (folder / "sessions.jsonl").write_text("\n".join(lines))
    return str(folder / "sessions.jsonl")


@pytest.mark.parametrize("kind", ["multi_turn", "agents"])
def test_a_session_is_dealt_once_for_all_its_turns(tmp_path, kind):
    workload = (
        MultiTurn(num_sessions=6, turns=3, **DEALT)
        if kind == "multi_turn"
        else Agents(path=sessions(tmp_path), **DEALT)
    )
    for first in arrivals(workload):
        request = SimpleNamespace(tags=first.tags, state=RequestState.FINISHED, token_ids=[1, 2, 3])
        (second,) = workload.on_result(request, 9.0)
        assert second.tags.turn == 1 and second.tags.session == first.tags.session
        same = [(a.tags.client, a.tags.priority, a.slo) for a in (first, second)]
        assert same[0] == same[1]


def test_the_random_workload_deals_clients_itself_and_tiers_as_the_others_do():
    made = arrivals(RandomLengths(clients=2, priorities=3, slo_tiers=TIERS))
    assert [a.tags.client for a in made[:3]] == ["c0", "c1", "c0"]
    assert [a.tags.priority for a in made] == [
        a.tags.priority for a in arrivals(RandomLengths(clients=2, priorities=3))
    ]
    assert {a.slo for a in made} == set(TIERS)


def test_the_demonstration_has_shared_beginnings_unlike_lengths_and_unlike_clients():
    made = arrivals(Demo())
    prompts = [tuple(a.prompt_token_ids) for a in made]
    beginnings = Counter(p[:16] for p in prompts if len(p) >= 16)
    assert sum(n for n in beginnings.values() if n > 1) > len(made) / 2
    assert len({len(p) for p in prompts}) > len(made) / 2 and len({a.output_len for a in made}) > 10
    assert len({a.tags.client for a in made}) == 3
    assert made[0].time > 0 and [a.time for a in made] == sorted(a.time for a in made)


@pytest.mark.parametrize("requests", [1, 2, 3])
def test_the_demonstration_may_be_as_short_as_one_likes(requests):
    assert len(arrivals(Demo(num_requests=requests))) == requests


@pytest.mark.parametrize("tiers", [[3.0], [None], [{"tfft": 0.5}], [{"ttft": "soon"}], [[]]])
def test_a_tier_is_a_set_of_targets_and_nothing_else(tiers):
    with pytest.raises(ConfigError, match=r"workload.slo_tiers\[0\].*: expected "):
        Demo(slo_tiers=tiers)


def test_a_table_of_targets_is_a_tier():
    assert Demo(slo_tiers=[{"ttft": 0.5}]).slo_tiers == [SLO(ttft=0.5)]


def test_clients_that_are_never_there_together_have_no_jain_index():
    result = RunResult(outputs=[output(c, float(i)) for i, c in enumerate("ab")], duration=3.0)
    summary = summarize(result)
    assert summary["num_clients"] == 2 and "jain_index" not in summary
    assert "2 clients, Jain -" in run_table(summary)


def output(client: str, at: float) -> RequestOutput:
    made = Request(Arrival(at, [1], tags=Tags(client=client)), 0, max_model_len=9, eos_token_ids=frozenset())
    made.first_scheduled_time, made.finish_time, made.token_times = at, at + 0.5, [at + 0.5]
    made.state = RequestState.FINISHED
    return RequestOutput.of(made)


# ---- adapters and salts ----------------------------------------------------------------------------------


def test_adapters_are_dealt_and_share_no_prefix():
    workload = RandomLengths(num_requests=60, adapters=3)
    made = arrivals(workload)
    assert {a.tags.adapter for a in made} == {"a0", "a1", "a2"}
    assert all(a.cache_salt == a.tags.adapter for a in made)
    plain = arrivals(RandomLengths(num_requests=60))
    assert {a.cache_salt for a in plain} == {""} == {a.tags.adapter for a in plain}
    assert [a.prompt_token_ids for a in made] == [a.prompt_token_ids for a in plain]


def test_a_session_keeps_its_adapter():
    workload = MultiTurn(num_sessions=8, adapters=4)
    first = {a.tags.session: a.tags.adapter for a in arrivals(workload)}
    assert len(set(first.values())) > 1


def test_prefixes_may_be_kept_within_a_client_or_a_session():
    made = arrivals(RandomLengths(num_requests=40, clients=4, salt="client"))
    assert {(a.tags.client, a.cache_salt) for a in made} == {(f"c{i}", f"c{i}") for i in range(4)}
    both = arrivals(RandomLengths(num_requests=40, clients=2, salt="client", adapters=2))
    assert {a.cache_salt for a in both} == {f"a{i}/c{j}" for i in range(2) for j in range(2)}
    with pytest.raises(ConfigError, match="salt"):
        RandomLengths(salt="everybody")


def test_salts_decide_who_hits():
    """The same prompts, of one client and of four that share nothing."""

    def cached(**parameters) -> int:
        workload = SharedPrefix(num_requests=24, **parameters)
        result = compose(cache="hash").run(list(workload.arrivals(1, 1000, 4096)))
        return sum(o.num_cached_tokens for o in result.outputs)

    assert cached() > cached(clients=4, salt="client") > 0
