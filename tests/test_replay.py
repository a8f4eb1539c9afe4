"""A recorded run repeats decision for decision, whatever its clock did; and two executors under the same step times agree."""

from __future__ import annotations

import random

import pytest

from core.config import EngineConfig, Hardware, ModelShape
from core.engine import Engine
from core.errors import ConfigError
from core.request import Arrival, SamplingParams, Tags
from core.testing.oracle import OracleExecutor
from plugins.cache.eviction.lru import LeastRecent
from plugins.cache.hash import HashBlocks
from plugins.executors.replay import (
    Record,
    RecordedTimes,
    Recorder,
    Replay,
    ReplayError,
    record,
)
from plugins.executors.sim import SimExecutor
from plugins.schedulers.chunked import ChunkedPrefill
from plugins.schedulers.order.fcfs import FirstCome
from plugins.schedulers.victim.newest import Newest

LIMITS = {"block_size": 4, "num_blocks": 24, "max_num_seqs": 6, "max_num_batched_tokens": 24}


class JitteryClock:
    """A wall clock made up: every reading moves it by chance, waits overshoot, steps end late."""

    def __init__(self, seed: int) -> None:
        self._rng, self._now = random.Random(seed), 0.0

    def now(self) -> float:
        self._now += self._rng.uniform(0.0001, 0.004)
        return self._now

    def advance_to(self, t: float) -> None:
        self._now = max(self._now, t + self._rng.uniform(0, 0.01))

    wait_until = advance_to


def small_shape(max_model_len: int = 64, vocab_size: int = 50) -> ModelShape:
    return ModelShape("LlamaForCausalLM", 16, 2, 4, 2, 4, 32, vocab_size, True, max_model_len)


def sim() -> SimExecutor:
    executor = SimExecutor()
    executor.prepare(small_shape(), Hardware())
    return executor


def oracle() -> OracleExecutor:
    return OracleExecutor(vocab_size=50, num_blocks=24)


def build(executor, max_inflight: int = 1, observers=(), **limits) -> Engine:
    roles = {
        "scheduler": ChunkedPrefill(), "order": FirstCome(), "victim": Newest(), "cache": HashBlocks(), "eviction": LeastRecent(),
        "executor": executor,
    }  # fmt: skip
    return Engine(roles, EngineConfig(**{**LIMITS, **limits}, max_inflight=max_inflight), seed=3, observers=observers)


class Chatter:
    """A closed loop: three sessions, each asks again 10 ms after an answer, with the answer in its next prompt."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    def first(self) -> list[Arrival]:
        return [Arrival(0.002 * s, [s + 1] * (5 + s), SamplingParams(max_tokens=6), tags=Tags(session=str(s))) for s in range(4)]

    def follow(self, request, now):
        if request.tags.turn + 1 < self.turns:
            tags = Tags(session=request.tags.session, turn=request.tags.turn + 1)
            yield Arrival(now + 0.01, [*request.token_ids, 7, 8, 9], SamplingParams(max_tokens=5), tags=tags, output_len=3 + tags.turn)


def open_loop(seed: int = 1, n: int = 20) -> list[Arrival]:
    rng, t, arrivals = random.Random(seed), 0.0, []
    for _ in range(n):
        t += rng.expovariate(40)
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 30))]
        arrivals.append(Arrival(t, prompt, SamplingParams(max_tokens=rng.randint(1, 20)), output_len=rng.choice([None, 4])))
    return arrivals


def run_recorded(tmp_path, max_inflight, arrivals, follow=None, executor=None):
    executor = executor or oracle()
    executor.clock = JitteryClock(9)
    engine = build(executor, max_inflight, observers=[Recorder(tmp_path)])
    return engine.run(arrivals, follow)


def replay(path, max_inflight, arrivals, follow=None):
    executor = Replay(str(path))
    executor.prepare()
    return build(executor, max_inflight).run(arrivals, follow)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_jittery_run_replays_to_the_identical_decision_log(tmp_path, max_inflight):
    original = run_recorded(tmp_path, max_inflight, open_loop())
    again = replay(tmp_path, max_inflight, open_loop())
    assert original.num_preemptions > 0, "the case should be a hard one"
    assert again.decision_hash == original.decision_hash
    assert [o.output_token_ids for o in again.outputs] == [o.output_token_ids for o in original.outputs]
    assert [o.token_times for o in again.outputs] == [o.token_times for o in original.outputs]


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_closed_loop_replays_too(tmp_path, max_inflight):
    original = run_recorded(tmp_path, max_inflight, Chatter().first(), Chatter().follow)
    again = replay(tmp_path, max_inflight, Chatter().first(), Chatter().follow)
    assert len(original.outputs) == 12
    assert again.decision_hash == original.decision_hash
    assert [(o.id, o.arrival_time, o.finish_time) for o in again.outputs] == [(o.id, o.arrival_time, o.finish_time) for o in original.outputs]


def test_two_wall_clock_runs_differ_so_that_the_replay_says_something(tmp_path):
    hashes = set()
    for seed in range(3):
        executor = oracle()
        executor.clock = JitteryClock(seed)
        hashes.add(build(executor).run(open_loop()).decision_hash)
    assert len(hashes) > 1


def test_a_run_that_differs_from_the_record_is_refused_at_the_step_where_it_shows(tmp_path):
    run_recorded(tmp_path, 1, open_loop(n=5))
    with pytest.raises(ReplayError, match=r"is not in .*replay\.npz|is not among|clock ends"):
        replay(tmp_path, 1, open_loop(n=20))


def test_a_run_that_waits_for_a_later_arrival_than_the_record_ends_instead_of_hanging(tmp_path):
    run_recorded(tmp_path, 1, [Arrival(0.0, [1, 2], SamplingParams(max_tokens=2))])
    with pytest.raises(ReplayError, match="the record's clock ends"):
        replay(tmp_path, 1, [Arrival(0.0, [1, 2], SamplingParams(max_tokens=2)), Arrival(99.0, [1], SamplingParams(max_tokens=2))])


def test_other_limits_than_the_records_are_refused_before_the_first_step(tmp_path):
    run_recorded(tmp_path, 1, open_loop(n=3))
    executor = Replay(str(tmp_path))
    executor.prepare()
    with pytest.raises(ConfigError, match="max_num_seqs=5.*recorded with 6"):
        build(executor, max_num_seqs=5)


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_a_missing_or_broken_record_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "replay.npz").write_bytes(content)
    with pytest.raises(ReplayError, match=r"replay\.npz"):
        Replay(str(tmp_path)).prepare()


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("closed", [False, True])
def test_two_executors_under_the_same_step_times_take_the_same_decisions(tmp_path, max_inflight, closed):
    run_recorded(tmp_path, 1, open_loop())
    durations = Record.load(tmp_path).durations
    results = []
    for inner in (sim(), oracle()):
        arrivals, follow = (Chatter().first(), Chatter().follow) if closed else (open_loop(), None)
        results.append(build(RecordedTimes(inner, durations), max_inflight).run(arrivals, follow))
    assert results[0].decision_hash == results[1].decision_hash
    assert results[0].duration == results[1].duration > 0
    assert [o.output_token_ids for o in results[0].outputs] != [o.output_token_ids for o in results[1].outputs], "tokens may differ, decisions not"


def test_the_cost_model_of_a_recorded_simulation_is_there_on_replay(tmp_path):
    executor = sim()
    engine = build(executor)
    engine.run(open_loop(n=3))
    again = Replay(str(record(engine, [(0, 0.0, 0.5)], tmp_path)))
    again.prepare()
    assert again.cost_model.step_time([3], [2]) == executor.cost_model.step_time([3], [2])
    assert again.caps == executor.caps
