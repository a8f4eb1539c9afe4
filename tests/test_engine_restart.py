"""One engine, many runs: each is as on a fresh engine, also after one that was cut off, wherever that was."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from helpers.scripted import ask, engine, everybody

from core.compose.config import EngineConfig
from core.engine import Engine
from core.inputs import Arrival
from core.outside import Observer
from core.policy import Retention
from core.testing.case import random_case
from core.testing.oracle import OracleExecutor
from core.testing.subject import Subject
from core.testing.trial import DecisionTrace, PoolCheck
from plugins.executors.record import recording

TICK = 1 / 64  # seconds per step: exact in binary, so that a run that begins later sees the same times
COMPOSITIONS = (
    ("scheduler=chunked", "order=fcfs", "cache=hash", "eviction=lru", "retention=keep"),
    ("scheduler=fcfs", "order=vtc", "cache=radix", "eviction=arc", "retention=drop"),
    ("scheduler=pd_split", "order=lpm", "cache=hash", "eviction=s3fifo", "retention=ttl"),
    ("scheduler=preemptive", "order=mlfq", "cache=radix", "eviction=gdsf", "victim=lcf"),
    ("scheduler=preemptive", "order=srpt", "cache=none", "predictor=history", "victim=random"),
)


def composed(words: tuple[str, ...], seed: int) -> tuple[Engine, list[Arrival]]:
    """An engine of these policies, small enough to be short of everything, and what it is asked."""
    case = random_case(seed, {})
    executor = OracleExecutor(5, 64, case.num_blocks, TICK, 0.0, case.eos, 4, case.placeholders)
    config = EngineConfig(
        case.block_size,
        case.num_blocks,
        case.max_num_seqs,
        case.max_num_batched_tokens,
        case.max_inflight,
        None,
        True,
    )
    running = Engine({**Subject(words).plain_roles(), "executor": executor}, config, seed=seed)
    running.decisions = DecisionTrace()
    running.observers.append(PoolCheck(running))
    return running, [replace(a.arrival(), time=TICK * i / 2) for i, a in enumerate(case.asks)]


def answers(running: Engine, arrivals: list[Arrival]) -> tuple:
    """Everything that a run is judged by, without the times on the engine's clock."""
    result = running.run(arrivals)
    outputs = [
        (
            o.id,
            o.state,
            o.finish_reason,
            o.output_token_ids,
            o.num_cached_tokens,
            o.num_preemptions,
            o.num_recomputed_tokens,
        )
        for o in result.outputs
    ]
    counts = (
        result.num_steps,
        result.num_evictions,
        result.num_preemptions,
        result.planned_tokens,
        result.kv_peak,
        result.duration,
    )
    return outputs, counts, list(running.decisions.decisions)


class CutOff(Exception):
    """Raised on purpose."""


def cut_off(running: Engine, owner: object, method: str, at: int, error: BaseException) -> None:
    """Raises the error in the at-th call of that method, and never again."""
    original, left = getattr(owner, method), [at]

    def call(*args):
        left[0] -= 1
        if not left[0]:
            raise error
        return original(*args)

    setattr(owner, method, call)


#: Where a run is cut off: role (or "" for the observer), method, with what.
CUTS = (
    ("", "on_step", KeyboardInterrupt),
    ("", "on_step", CutOff),
    ("scheduler", "plan", KeyboardInterrupt),
    ("scheduler", "plan", CutOff),
    ("executor", "launch", CutOff),
    ("executor", "launch", KeyboardInterrupt),
    ("executor", "collect", KeyboardInterrupt),
    ("cache", "insert", CutOff),
    ("cache", "match", KeyboardInterrupt),
    ("order", "order", CutOff),
    ("eviction", "on_insert", KeyboardInterrupt),
)


@pytest.mark.parametrize("words", COMPOSITIONS, ids=" ".join)
def test_a_run_after_one_that_was_cut_off_is_as_on_a_fresh_engine(words: tuple[str, ...]) -> None:
    cut = 0
    for seed in range(3 * len(CUTS)):
        role, method, error = CUTS[seed % len(CUTS)]
        running, arrivals = composed(words, seed)
        owner = running.roles[role] if role else running.observers[0]
        cut_off(running, owner, method, Random(seed).randint(1, 12), error())
        try:
            status = running.run(arrivals).status
        except Exception as raised:
            status = raised.partial.status
        if status == "finished":
            continue  # it ended before its time came, or never called the method
        cut += 1
        assert running.pool.num_used == running.pool.num_cached == 0, "blocks come back"
        running.pool.check()
        fresh, _ = composed(words, seed)
        assert answers(running, arrivals) == answers(fresh, arrivals), f"seed {seed}: {role}.{method}"
    assert cut >= len(CUTS)


def test_the_runs_that_follow_answer_their_own_requests_alone() -> None:
    class Once(Observer):
        def on_step(self, record):
            if record.step == 2:
                running.observers.clear()
                raise KeyboardInterrupt

    running = engine(observers=[Once()])
    first = running.run([ask(id="a", answer=9), ask(time=99.0, id="late")])
    assert (first.status, [(o.id, o.state) for o in first.outputs]) == ("interrupted", [("a", "aborted")])
    assert [o.id for o in running.run([ask(id="b")]).outputs] == ["b"], (
        "what was still to come belongs to the run that was cut off"
    )
    assert running.run([ask(id="b")]).outputs[0].state == "finished", "ids are unique in a run"


def test_counts_times_and_outputs_are_those_of_one_run() -> None:
    running = engine(executor=OracleExecutor(step_seconds=TICK))
    asked = [ask([1] * 9, 8), ask([2] * 9, 8, time=4 * TICK), ask([3] * 9, 2, time=3.0)]
    runs = [running.run(asked) for _ in range(3)]
    assert [len(r.outputs) for r in runs] == [3, 3, 3]
    assert runs[1].num_steps == runs[2].num_steps == runs[0].num_steps
    assert runs[1].planned_tokens == runs[2].planned_tokens < runs[0].planned_tokens, (
        "what is cached stays cached"
    )
    assert runs[0].duration == runs[1].duration == runs[2].duration
    waits = [[o.first_scheduled_time - o.arrival_time for o in r.outputs] for r in runs]
    assert all(wait == pytest.approx(0.0, abs=0.02) for wait in sum(waits, [])), (
        "arrivals are at seconds since their run began"
    )


def test_an_engine_keeps_nothing_of_the_runs_that_are_over() -> None:
    running = engine(max_inflight=2, roles={"retention": Retention()})
    sizes = []
    for _ in range(6):
        running.run([ask(id=f"x{i}", answer=4) for i in range(5)])
        sizes.append(
            (
                len(running.roster.finished),
                len(running.intake.ids),
                len(running.clock.readings),
                len(running.ledger.accounts),
            )
        )
    assert set(sizes[1:]) == {sizes[1]} and sizes[1][0] == 5
    assert running.clock.readings == [], "recording is for those who ask"


def test_readings_of_the_clock_are_kept_for_a_recorder_and_for_its_run_alone(tmp_path) -> None:
    running = engine(observers=recording(tmp_path))
    running.run([ask(id="a")])
    assert len(running.clock.readings) > 3
    running.observers.clear()
    running.run([ask(id="b")])
    assert running.clock.readings == []


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_run_after_aborts_finds_everything_clean(depth: int) -> None:
    """Wherever a request was when it was aborted: waiting, running, with steps in flight, not yet arrived."""

    class Aborts(Observer):
        def on_step(self, record):
            running.abort(chance.choice(ids))

    for seed in range(12):
        chance, ids = Random(seed), [f"r{i}" for i in range(6)]
        running = engine(
            observers=[Aborts()], max_inflight=depth, num_blocks=10, executor=OracleExecutor(num_blocks=10)
        )
        running.observers.append(PoolCheck(running))
        first = running.run([ask(5 + i, 9, time=0.01 * i, id=id) for i, id in enumerate(ids)])
        assert sorted(o.id for o in first.outputs) == ids and {o.state for o in first.outputs} <= {
            "aborted",
            "finished",
        }
        roster = running.roster
        assert not (
            roster.present
            or roster.releasing
            or roster.hidden_ends
            or len(running.flights)
            or len(running.arrivals)
        )
        assert running.pool.num_used == 0
        running.observers.pop(0)
        again = running.run([ask(5 + i, 9, time=0.01 * i, id=id) for i, id in enumerate(ids)])
        assert [(o.id, o.state) for o in again.outputs] == [(id, "finished") for id in ids]


def test_policies_are_set_up_anew_only_after_a_run_that_was_cut_off() -> None:
    class Counts(Retention):
        setups = 0

        def setup(self, ctx):
            super().setup(ctx)
            self.setups += 1

    counts = Counts()

    def script(step, view):
        everybody(step, view)

    running = engine(script, roles={"retention": counts})
    running.run([ask()])
    running.run([ask()])
    assert counts.setups == 1, "what they have learned goes on"
    cut_off(running, running.roles.scheduler, "plan", 1, CutOff())
    with pytest.raises(Exception, match="CutOff"):
        running.run([ask()])
    assert counts.setups == 2


def test_arrivals_added_before_a_run_are_part_of_it() -> None:
    running = engine()
    running.add(ask(id="a"))
    assert [o.id for o in running.run([ask(id="b")]).outputs] == ["a", "b"]
