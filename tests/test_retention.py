"""Retention: what stays cached after a request has ended, for how long, and what it is worth."""

from __future__ import annotations

from dataclasses import replace
from math import isclose, log
from random import Random

import pytest
from helpers.policy_runs import REGISTRY, Server, ask, compose, run

from core.compose.config import EngineConfig
from core.errors import ConfigError
from core.inputs import Arrival
from core.request import Request
from core.testing.subject import Subject
from core.testing.trial import Trial
from plugins.cache.retention.ttl import Memory

CACHED = {"cache": "hash", "eviction": "lru"}
CONFIG = EngineConfig(block_size=4, num_blocks=12, max_num_seqs=1, check=True)
AGENT = list(range(100, 124))  # 6 blocks of 4


class Dear(Server):
    """Steps are short, but a policy believes that a prefilled token takes a second, so that a pin of a few
    seconds pays in a small pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cost_model = Server(overhead=0.0, per_token=1.0)


def cached_tokens(arrivals: list[Arrival], retention, config: EngineConfig = CONFIG) -> dict[str, int]:
    result = run(arrivals, retention=retention, engine=config, server=Dear(per_token=0.001), **CACHED)
    assert all(o.state == "finished" for o in result.outputs)
    return {o.id: o.num_cached_tokens for o in result.outputs}


def interrupted_agent(pause: float, tool: str = "search") -> list[Arrival]:
    """An agent's turn that calls a tool, somebody else whose prompt needs the whole pool less 4 blocks, and
    the agent's next turn."""
    other = ask(0.2, list(range(300, 330)), 2, "other")  # 8 blocks
    return [
        ask(0.0, AGENT, 2, "first", session="a", tool=tool),
        other,
        ask(pause, [*AGENT, 1, 7], 2, "second", session="a", turn=1),
    ]


def test_keep_is_what_happens_without_a_policy() -> None:
    arrivals = interrupted_agent(1.0)
    plain = run(arrivals, engine=CONFIG, **CACHED)
    assert run(arrivals, retention="keep", engine=CONFIG, **CACHED).decision_hash == plain.decision_hash


def test_drop_leaves_nothing_for_the_next_request() -> None:
    arrivals = [ask(0.0, AGENT, 2, "first"), ask(1.0, AGENT, 2, "second"), ask(2.0, AGENT, 2, "third")]
    assert cached_tokens(arrivals, "keep") == {"first": 0, "second": 20, "third": 20}
    assert cached_tokens(arrivals, "drop") == {"first": 0, "second": 0, "third": 0}


def test_drop_spares_what_a_running_request_shares() -> None:
    arrivals = [ask(0.0, AGENT, 40, "long"), ask(0.05, AGENT, 1, "short"), ask(0.2, AGENT, 1, "again")]
    config = EngineConfig(block_size=4, num_blocks=64, max_num_seqs=4, check=True)
    assert cached_tokens(arrivals, "drop", config) == {"long": 0, "short": 20, "again": 20}


def test_drop_frees_the_pool() -> None:
    engine = compose(retention="drop", engine=CONFIG, **CACHED)
    engine.run([ask(0.0, AGENT, 4), ask(0.0, AGENT[:8], 4)])
    assert engine.pool.num_free == 12 and engine.pool.num_cached == 0


class TestTimeToLive:
    def test_a_pin_protects_the_blocks_during_the_tool_call(self) -> None:
        """Two other requests fill the pool one after the other: the second evicts the agent's blocks, or
        under ttl the first one's."""
        config = EngineConfig(block_size=4, num_blocks=15, max_num_seqs=1, check=True)
        eight = ask(0.2, list(range(300, 330)), 2, "other")
        nine = ask(0.4, list(range(400, 430)), 2, "another")
        first, _, second = interrupted_agent(1.0)
        assert cached_tokens([first, eight, nine, second], "keep", config)["second"] == 0
        assert cached_tokens([first, eight, nine, second], ("ttl", {"prior": 5.0}), config)["second"] == 24

    def test_only_a_tool_call_is_pinned(self) -> None:
        config = EngineConfig(block_size=4, num_blocks=15, max_num_seqs=1, check=True)
        first, other, second = interrupted_agent(1.0, tool="")
        nine = ask(0.4, list(range(400, 430)), 2, "another")
        assert cached_tokens([first, other, nine, second], "ttl", config)["second"] == 0

    def test_the_pin_ends_with_its_time(self) -> None:
        engine = compose(
            retention=("ttl", {"prior": 5.0}), engine=CONFIG, server=Dear(per_token=0.001), **CACHED
        )
        first, _, second = interrupted_agent(60.0)
        engine.add(first)
        while engine.step():
            pass
        assert engine.pool.num_pinned == 6  # nothing but time can end it
        engine.add(second)
        while not engine.running.items:
            engine.step()
        assert engine.pool.num_pinned == 0

    def test_a_pin_gives_way_when_memory_runs_out(self) -> None:
        # 11 of 12 blocks
        arrivals = [
            ask(0.0, AGENT, 2, "first", session="a", tool="search"),
            ask(0.1, list(range(300, 340)), 4, "large"),
        ]
        assert cached_tokens(arrivals, ("ttl", {"prior": 5.0})) == {"first": 0, "large": 0}

    def test_the_time_covers_short_calls_and_gives_up_long_ones(self) -> None:
        """Nine calls of 1 s and one of 1000 s, a prefill of 20 s: waiting for the last costs more than it
        saves.
        """
        policy = _set_up("ttl", min_calls=4, prefill_rate=200.0)
        _calls(policy, [1.0] * 9 + [1000.0])
        assert policy.time_to_live(_finished(num_tokens=4000, blocks=100)) == 1.0

    def test_the_time_is_where_the_benefit_less_the_wait_peaks(self) -> None:
        policy = _set_up("ttl", min_calls=1, prefill_rate=1000.0)  # 1000 tokens are worth 1 s
        durations = [0.5, 2.0, 3.0, 8.0]
        _calls(policy, durations)
        for tokens in (100, 1000, 3000, 9000, 20_000, 100_000):
            worth = {0.0: 0.0} | {
                tau: sum(d <= tau for d in durations) / 4 * tokens / 1000 - tau for tau in durations
            }
            assert worth[policy.time_to_live(_finished(tokens, 10))] == max(worth.values())

    def test_the_price_of_a_pin_is_its_time_whatever_its_size(self) -> None:
        policy = _set_up("ttl", min_calls=1, prefill_rate=1000.0)
        _calls(policy, [0.5, 2.0])
        assert len({policy.time_to_live(_finished(9000, blocks)) for blocks in (1, 500, 999)}) == 1

    def test_a_tool_with_few_calls_goes_by_those_of_all_tools_and_without_many_by_the_prior(self) -> None:
        policy = _set_up("ttl", min_calls=4, prior=2.0, prefill_rate=1000.0)
        assert isclose(policy.time_to_live(_finished(9000, 10)), 2.0 * log(9.0 / 2.0))
        assert policy.time_to_live(_finished(1999, 10)) == 0.0  # 2 s of prefill are not worth waiting for
        _calls(policy, [3.0] * 4, tool="other")
        assert policy.time_to_live(_finished(9000, 10)) == 3.0
        _calls(policy, [1.0] * 4)
        assert policy.time_to_live(_finished(9000, 10)) == 1.0

    def test_queueing_counts_for_turns_whose_blocks_were_evicted_and_for_no_others(self) -> None:
        """The first agent waits 0.2 s behind another and finds its blocks gone, or, in a large pool, in
        place.
        """
        for num_blocks, queueing in ((12, True), (64, False)):
            config = EngineConfig(block_size=4, num_blocks=num_blocks, max_num_seqs=1, check=True)
            engine = compose(retention=("ttl", {"min_calls": 1}), engine=config, server=Server(), **CACHED)
            first, _, second = interrupted_agent(0.15)
            between = ask(0.1, list(range(300, 340)), 4, "between")
            engine.run([first, between, ask(0.12, list(range(400, 440)), 4, "also"), second])
            times = engine.roles.retention._queueing
            assert bool(times) is queueing
            assert all(time > 0.02 for time in times)

    def test_eta_is_minus_the_correlation_of_calls_made_and_calls_left(self) -> None:
        rng = Random(0)
        for lengths in ([5] * 9, [2, 9, 3, 30, 4], [1 + int(rng.expovariate(0.1)) for _ in range(4000)]):
            memory = Memory()
            made, left = [], []
            for calls in lengths:
                memory.learn(calls)
                made += range(1, calls)
                left += range(calls - 1, 0, -1)
            assert memory.eta == pytest.approx(-correlation(made, left), abs=1e-9)
        assert abs(memory.eta) < 0.1, "what has no memory says nothing about the calls that are left"
        assert Memory().eta == 1.0

    def test_eta_weighs_the_queueing(self) -> None:
        policy = _set_up("ttl", min_calls=1, prefill_rate=1000.0)
        _calls(policy, [3.0])
        policy._queueing.append(8.0)
        assert policy.time_to_live(_finished(1000, 10)) == 3.0  # 1 s of prefill and 8 of queueing
        for calls in (1, 2, 2, 2, 3, 5, 9, 17):
            policy.memory.learn(calls)
        assert 8.0 * policy.memory.eta + 1.0 < 3.0
        assert policy.time_to_live(_finished(1000, 10)) == 0.0

    def test_a_program_ends_with_a_request_that_calls_no_tool(self) -> None:
        policy = _set_up("ttl")
        for _ in range(4):
            _calls(policy, [1.0, 1.0])
            policy.retain(_finished(10, 1, tool=""), _NoPins(), 0.0)
        alike = Memory()
        alike.learn(3)
        assert policy.memory.eta == alike.eta == pytest.approx(1.0)

    @pytest.mark.parametrize(
        "bad", [{"prior": 0.0}, {"min_calls": 0}, {"history": 2}, {"prefill_rate": -1.0}]
    )
    def test_senseless_parameters_are_refused(self, bad: dict) -> None:
        with pytest.raises(ConfigError, match=next(iter(bad))):
            _set_up("ttl", **bad)


class _NoPins:
    def pin(self, request, until: float) -> None: ...
    def unpin(self, session: str) -> None: ...
    def drop(self, request) -> None: ...


def _set_up(name: str, **parameters):
    return compose(
        retention=(name, parameters), cache="hash", engine=EngineConfig(num_blocks=1000), server=_Plain()
    ).roles.retention


class _Plain(Server):
    """A server whose step times nobody knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cost_model = None


def _calls(policy, durations: list[float], tool: str = "search") -> None:
    """Turns of a session that call the tool, which takes so long."""
    for seconds in durations:
        policy.retain(_finished(1, 1, tool), _NoPins(), 0.0)
        policy.on_arrival(_of(Arrival(seconds, [1], tags=_TAGS)), seconds)


def _of(arrival: Arrival):
    return Request(arrival, 0, max_model_len=1 << 20, eos_token_ids=frozenset())


def correlation(x: list[int], y: list[int]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    return covariance / spread**0.5


def _finished(num_tokens: int, blocks: int, tool: str = "search"):
    request = _of(Arrival(0.0, [1] * num_tokens, tags=replace(_TAGS, tool=tool)))
    request.block_table = list(range(blocks))
    return request


_TAGS = ask(0.0, [1], 1, session="a", tool="search").tags


@pytest.mark.parametrize("retention", REGISTRY.names("retention"))
def test_the_pool_is_whole_when_everything_has_ended(retention: str) -> None:
    for cache in ("hash", "radix"):
        subject = Subject((f"cache={cache}", f"retention={retention}"))
        for seed in range(60):
            case = subject.case(seed)
            failure = Trial(case, subject.roles).run().failure
            assert failure is None, f"{failure}\n{case}"
