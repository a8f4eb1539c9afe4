"""Retention: what stays cached after a request has ended, for how long, and what it is worth."""

from __future__ import annotations

from math import isclose, log

import pytest
from policy_runs import REGISTRY, Server, ask, compose, run

from core.config import EngineConfig
from core.errors import ConfigError
from core.request import Arrival, Request
from core.testing.subject import Subject
from core.testing.trial import Trial

CACHED = {"cache": "hash", "eviction": "lru"}
CONFIG = EngineConfig(block_size=4, num_blocks=12, max_num_seqs=1, check=True)
AGENT = list(range(100, 124))  # 6 blocks of 4


class Dear(Server):
    """Steps are short, but a policy believes that a prefilled token takes a second, so that a pin of a few seconds pays in a small pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cost_model = Server(overhead=0.0, per_token=1.0)


def cached_tokens(arrivals: list[Arrival], retention, config: EngineConfig = CONFIG) -> dict[str, int]:
    result = run(arrivals, retention=retention, engine=config, server=Dear(per_token=0.001), **CACHED)
    assert all(o.state == "finished" for o in result.outputs)
    return {o.id: o.num_cached_tokens for o in result.outputs}


def interrupted_agent(pause: float, tool: str = "search") -> list[Arrival]:
    """An agent's turn that calls a tool, somebody else whose prompt needs the whole pool less 4 blocks, and the agent's next turn."""
    other = ask(0.2, list(range(300, 330)), 2, "other")  # 8 blocks
    return [ask(0.0, AGENT, 2, "first", session="a", tool=tool), other, ask(pause, [*AGENT, 1, 7], 2, "second", session="a", turn=1)]


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
        """Two other requests fill the pool one after the other: the second evicts the agent's blocks, or under ttl the first one's."""
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
        engine = compose(retention=("ttl", {"prior": 5.0}), engine=CONFIG, server=Dear(per_token=0.001), **CACHED)
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
        arrivals = [ask(0.0, AGENT, 2, "first", session="a", tool="search"), ask(0.1, list(range(300, 340)), 4, "large")]  # 11 of 12 blocks
        assert cached_tokens(arrivals, ("ttl", {"prior": 100.0})) == {"first": 0, "large": 0}

    def test_the_time_covers_short_calls_and_gives_up_long_ones(self) -> None:
        """Nine calls of 1 s and one of 1000 s: waiting for the last is not worth the memory."""
        policy = _set_up("ttl", min_calls=4)
        request = _finished(num_tokens=4000, blocks=100)
        for seconds in [1.0] * 9 + [1000.0]:
            policy.retain(_finished(1, 1), _NoPins(), 0.0)
            policy.on_arrival(_arriving(seconds), seconds)
        assert policy.time_to_live(request) == 1.0

    def test_the_time_is_where_the_benefit_less_the_cost_peaks(self) -> None:
        policy = _set_up("ttl", min_calls=1, prefill_rate=1000.0)  # 1000 tokens are worth 1 s
        durations = [0.5, 2.0, 3.0, 8.0]
        for seconds in durations:
            policy.retain(_finished(1, 1), _NoPins(), 0.0)
            policy.on_arrival(_arriving(seconds), seconds)
        for blocks in (1, 50, 100, 300, 600, 999):
            price = blocks / 1000
            worth = {0.0: 0.0} | {tau: sum(d <= tau for d in durations) / 4 - tau * price for tau in durations}
            assert worth[policy.time_to_live(_finished(1000, blocks))] == max(worth.values())

    def test_an_unknown_tool_counts_as_exponential(self) -> None:
        policy = _set_up("ttl", prior=2.0, prefill_rate=1000.0)
        assert isclose(policy.time_to_live(_finished(1000, 100)), 2.0 * log(1.0 / (0.1 * 2.0)))
        assert policy.time_to_live(_finished(100, 999)) == 0.0  # 0.1 s of prefill is not worth the whole pool

    def test_a_longer_context_is_pinned_longer(self) -> None:
        policy = _set_up("ttl")
        times = [policy.time_to_live(_finished(n, 10)) for n in (100, 1000, 10000, 100000)]
        assert times == sorted(times) and times[0] < times[-1]

    @pytest.mark.parametrize("bad", [{"prior": 0.0}, {"min_calls": 0}, {"history": 2}, {"prefill_rate": -1.0}])
    def test_senseless_parameters_are_refused(self, bad: dict) -> None:
        with pytest.raises(ConfigError, match=next(iter(bad))):
            _set_up("ttl", **bad)


class _NoPins:
    def pin(self, request, until: float) -> None: ...
    def unpin(self, session: str) -> None: ...
    def drop(self, request) -> None: ...


def _set_up(name: str, **parameters):
    return compose(retention=(name, parameters), cache="hash", engine=EngineConfig(num_blocks=1000), server=_Plain()).roles.retention


class _Plain(Server):
    """A server whose step times nobody knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cost_model = None


def _arriving(time: float):
    return _of(Arrival(time, [1], tags=_TAGS))


def _of(arrival: Arrival):
    return Request(arrival, 0, max_model_len=1 << 20, eos_token_ids=frozenset())


def _finished(num_tokens: int, blocks: int):
    request = _of(Arrival(0.0, [1] * num_tokens, tags=_TAGS))
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
