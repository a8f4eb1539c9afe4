"""The step log: what files hold of the steps is what the records of the steps said, and none of them stays
alive."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.scripted import ask, engine

from core.compose.build import Composition, build
from core.compose.defaults import default_choices
from core.compose.hooks import load_registry
from core.execution import StepResult
from core.measure import step_log
from core.measure.step_log import StepColumns, StepLog
from core.outside import Observer
from core.plan import StepPlan
from core.testing.oracle import OracleExecutor
from headway import EngineConfig
from plugins.executors.record import PlanDigest, Recorder, ReplayError, digests
from plugins.observers.tables import Tables

INT, INTS, TIME = pa.int64(), pa.list_(pa.int32()), pa.float64()
STEPS = {
    "step": INT,
    "start": TIME,
    "end": TIME,
    "emitted": INT,
    "policy_time": TIME,
    "num_running": INT,
    "num_waiting": INT,
    "kv_used": INT,
    "kv_cached": INT,
    "num_preempted": INT,
    "num_evicted": INT,
    "num_seqs": pa.int32(),
    "num_tokens": pa.int32(),
    "timings": pa.map_(pa.string(), TIME),
}
DECISIONS = {
    "step": INT,
    "now": TIME,
    "requests": INTS,
    "starts": INTS,
    "lengths": INTS,
    "preempted": INTS,
    "allocated_requests": INTS,
    "allocated_first": INTS,
    "allocated_blocks": pa.list_(INTS),
}


class Timed(OracleExecutor):
    """Says how long parts of some steps took."""

    def collect(self, ticket) -> StepResult:
        result = super().collect(ticket)
        self.collected = getattr(self, "collected", 0) + 1
        parts = [{}, {"attention": 0.5, "host": float(self.collected)}, {"host": 0.25}]
        return replace(result, timings=parts[self.collected % 3])


class Kept(Observer):
    """The records themselves."""

    plugin_name = "kept"

    def on_start(self, engine) -> None:
        self.records = []

    def on_step(self, record) -> None:
        self.records.append(record)


def crowded(*observers: Observer):
    """Runs more requests than the pool can hold: prompts in chunks, preemptions, prefix hits, evictions."""

    def script(step, view) -> None:
        for request in (*view.running, *view.waiting):
            step.add(request, 5)

    arrivals = [ask(prompt=5 + i % 9, answer=4 + i % 7, time=0.001 * i) for i in range(40)]
    running = engine(script, executor=Timed(num_blocks=9), num_blocks=9, observers=observers)
    return running.run(arrivals)


def step_row(record) -> dict:
    plan, own = (
        record.plan,
        {name: getattr(record, name) for name in STEPS if name in type(record).__dataclass_fields__},
    )
    return own | {
        "num_seqs": len(plan.requests),
        "num_tokens": plan.num_tokens,
        "timings": list(record.timings.items()),
    }


def decision_row(record) -> dict:
    plan = record.plan
    return {
        "step": plan.step,
        "now": plan.now,
        "requests": [r.index for r in plan.requests],
        "starts": plan.starts,
        "lengths": plan.lengths,
        "preempted": [r.index for r in plan.preempted],
        "allocated_requests": [a.request.index for a in plan.allocated],
        "allocated_first": [a.first for a in plan.allocated],
        "allocated_blocks": [a.blocks for a in plan.allocated],
    }


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_tables_hold_what_the_records_said_in_columns_of_the_documented_types(
    tmp_path: Path, monkeypatch, piece: int
) -> None:
    monkeypatch.setattr(step_log, "MOST_STEPS", piece)
    kept, tables = Kept(), Tables(tmp_path)
    result = crowded(kept, StepLog(tables.read), tables)
    assert result.num_preemptions and result.num_evictions and any(record.timings for record in kept.records)
    for name, columns, row in (("steps", STEPS, step_row), ("decisions", DECISIONS, decision_row)):
        found = pq.read_table(tmp_path / f"{name}.parquet")
        assert dict(zip(found.schema.names, found.schema.types, strict=True)) == columns
        assert found.to_pylist() == [row(record) for record in kept.records]


def test_a_run_without_steps_has_tables_without_rows(tmp_path: Path) -> None:
    tables = Tables(tmp_path)
    engine(observers=[StepLog(tables.read), tables]).run([])
    for name, columns in (("steps", STEPS), ("decisions", DECISIONS)):
        found = pq.read_table(tmp_path / f"{name}.parquet")
        assert (
            found.num_rows == 0 and dict(zip(found.schema.names, found.schema.types, strict=True)) == columns
        )


def test_digests_of_columns_are_those_of_plans() -> None:
    kept, found = Kept(), []
    crowded(kept, StepLog(lambda steps: found.append(digests(steps))))
    assert [PlanDigest(*row) for row in np.concatenate(found).tolist()] == [
        PlanDigest.of(r.plan) for r in kept.records
    ]


def test_an_engine_s_second_run_begins_a_new_log() -> None:
    pieces: list[StepColumns] = []
    running = engine(observers=[StepLog(pieces.append)])
    lengths = [running.run([ask(answer=answer)]).num_steps for answer in (3, 5)]
    assert [len(piece.numbers["step"]) for piece in pieces] == lengths


def test_a_step_that_was_cut_off_while_it_was_logged_is_left_out() -> None:
    kept, pieces = Kept(), []
    crowded(kept)
    log = StepLog(pieces.append)
    whole, cut = kept.records[:6], kept.records[6]
    for record in whole:
        log.on_step(record)
    with pytest.raises(KeyboardInterrupt):
        log.on_step(replace(cut, timings=Interrupting(host=1.0)))
    log.close(None)
    (steps,) = pieces
    assert steps.numbers["step"].tolist() == [record.step for record in whole]
    assert len(steps.requests.values) == sum(len(record.plan.requests) for record in whole)
    assert len(steps.numbers["start"]) == len(whole) == len(steps.timings.offsets) - 1


class Interrupting(dict):
    def values(self):
        raise KeyboardInterrupt


def test_plans_do_not_stay_alive() -> None:
    most = 0

    class Counting(Observer):
        plugin_name = "counting"

        def on_step(self, record) -> None:
            nonlocal most
            if record.step % 10 == 9:
                most = max(most, sum(type(thing) is StepPlan for thing in gc.get_objects()))

    gc.collect()
    crowded(StepLog(lambda steps: None), Counting())
    assert 0 < most <= 2  # the one that is told, and the next in its making


def test_a_reader_that_fails_takes_no_step_from_the_others() -> None:
    found: list[StepColumns] = []

    def fails(steps: StepColumns) -> None:
        raise ValueError("no room in the heart")

    with pytest.raises(Exception, match="step log.*no room in the heart") as raised:
        crowded(StepLog(fails, found.append))
    assert sum(len(piece.numbers["step"]) for piece in found) == raised.value.partial.num_steps


def test_one_log_serves_all_files_of_a_run_and_none_is_kept_where_nobody_reads(tmp_path: Path) -> None:
    choices = {
        **default_choices(),
        "executor": ("oracle", {"vocab_size": 512, "max_model_len": 256}),
        "workload": ("random", {"num_requests": 2}),
    }
    composition = Composition(choices, engine=EngineConfig(block_size=4, num_blocks=12))
    run = build(load_registry(), composition, directory=tmp_path)
    logs = [observer for observer in run.engine.observers if isinstance(observer, StepLog)]
    assert logs == [run.step_log] and len(run.step_log.readers) == 3
    assert not any(
        isinstance(observer, StepLog) for observer in build(load_registry(), composition).engine.observers
    )


def test_a_recorder_that_hears_of_no_step_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="give the engine the observers of `recording`"):
        crowded(Recorder(tmp_path))
    assert not list(tmp_path.iterdir())
