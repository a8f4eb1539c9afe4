"""The run as tables: requests.parquet, steps.parquet and decisions.parquet in the run's directory."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from headway import Engine, Observer, RequestOutput, RunResult, StepRecord, hookimpl, metrics, whole

NAMES = ("requests.parquet", "steps.parquet", "decisions.parquet")
ROWS = 4096  # steps held before they are written: a step only appends a reference, and most runs write when they have ended


class Tables(Observer):
    """One row a request, one row a step, one row a decision. See docs/metrics.md for the columns."""

    plugin_name = "tables"

    def __init__(self, directory: Path, names: Collection[str] = NAMES) -> None:
        self.directory, self.names = directory, names

    def on_start(self, engine: Engine) -> None:
        self._records: list[StepRecord] = []
        self._files = ExitStack()
        self._writers: dict[str, Any] = {}
        self._problem: OSError | None = None  # a full disk ends no run, whose other files are written

    def on_step(self, record: StepRecord) -> None:
        if self._problem is None:
            self._records.append(record)
            if len(self._records) >= ROWS:
                self._flush()

    def _flush(self) -> None:
        records, self._records = self._records, []
        for name, rows in (("steps.parquet", _steps), ("decisions.parquet", _decisions)):
            if name in self.names:
                self._write(name, rows(records))

    def _write(self, name: str, table: Any) -> None:
        import pyarrow.parquet as pq

        try:
            if name not in self._writers:
                scratch = self._files.enter_context(whole(self.directory / name))
                writer = pq.ParquetWriter(scratch, table.schema, **_encoding(table.schema))
                self._writers[name] = self._files.enter_context(writer)
            self._writers[name].write_table(table)
        except OSError as error:
            self._problem = self._problem or error

    def close(self, result: RunResult) -> None:
        """Where one table could not be written, none of them stays: they would be of different lengths."""
        with self._files:
            self._flush()
            if "requests.parquet" in self.names:
                self._write("requests.parquet", _requests(result.outputs))
            if self._problem is not None:
                raise self._problem


def _encoding(schema: Any) -> dict[str, Any]:
    """Times all differ, so no dictionary holds them; split by byte, their leading bytes compress well."""
    times = [field.name for field in schema if str(field.type) == "double"]
    times += [f"{field.name}.list.element" for field in schema if str(field.type) == "list<item: double>"]
    others = [field.name for field in schema if field.name not in times and "double" not in str(field.type)]
    return {"compression": "zstd", "use_byte_stream_split": times, "use_dictionary": others}


def _steps(records: list[StepRecord]) -> Any:
    import pyarrow as pa

    plain = ("step", "start", "end", "emitted", "policy_time", "num_running", "num_waiting", "kv_used", "kv_cached", "num_preempted", "num_evicted")
    times = {"start", "end", "policy_time"}
    columns = {name: pa.array([getattr(r, name) for r in records], pa.float64() if name in times else pa.int64()) for name in plain}
    columns["num_seqs"] = pa.array([len(r.plan.requests) for r in records], pa.int32())
    columns["num_tokens"] = pa.array([r.plan.num_tokens for r in records], pa.int32())
    columns["timings"] = pa.array([list(r.timings.items()) for r in records], pa.map_(pa.string(), pa.float64()))
    return pa.table(columns)


def _decisions(records: list[StepRecord]) -> Any:
    """Parallel lists a step, as in StepPlan; requests by index. A block list belongs to the allocation at its place."""
    import pyarrow as pa

    plans = [r.plan for r in records]
    return pa.table(
        {
            "step": pa.array([p.step for p in plans], pa.int64()),
            "now": pa.array([p.now for p in plans], pa.float64()),
            "requests": _lists([[r.index for r in p.requests] for p in plans]),
            "starts": _lists([p.starts for p in plans]),
            "lengths": _lists([p.lengths for p in plans]),
            "preempted": _lists([[r.index for r in p.preempted] for p in plans]),
            "allocated_requests": _lists([[a.request.index for a in p.allocated] for p in plans]),
            "allocated_first": _lists([[a.first for a in p.allocated] for p in plans]),
            "allocated_blocks": pa.array([[a.blocks for a in p.allocated] for p in plans], pa.list_(pa.list_(pa.int32()))),
        }
    )


def _lists(rows: list[list[int]]) -> Any:
    """A column of int32 lists; flattening first is three times faster than leaving it to Arrow."""
    import numpy as np
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1])))


def _requests(outputs: list[RequestOutput]) -> Any:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    plain = {
        "id": text, "index": whole, "state": text, "finish_reason": text, "arrival_time": real, "first_scheduled_time": real, "finish_time": real,
        "num_prompt_tokens": whole, "num_cached_tokens": whole, "num_preemptions": whole, "num_recomputed_tokens": whole,
        "prompt": text, "text": text,
    }  # fmt: skip
    columns = {name: pa.array([getattr(o, name) for o in outputs], kind) for name, kind in plain.items()}
    columns["num_output_tokens"] = pa.array([len(o.token_times) for o in outputs], whole)
    for name, function in (("ttft", metrics.ttft), ("tpot", metrics.tpot), ("e2el", metrics.e2el)):
        columns[name] = pa.array([function(o) for o in outputs], real)
    columns["meets_slo"] = pa.array([metrics.meets_slo(o) for o in outputs], pa.bool_())
    for name in ("client", "session", "category"):
        columns[name] = pa.array([getattr(o.tags, name) for o in outputs], text)
    for name in ("turn", "priority"):
        columns[name] = pa.array([getattr(o.tags, name) for o in outputs], whole)
    columns["token_times"] = pa.array([o.token_times for o in outputs], pa.list_(real))
    columns["output_token_ids"] = pa.array([o.output_token_ids for o in outputs], pa.list_(pa.int32()))
    return pa.table(columns)


@hookimpl
def headway_observers(run):
    names = [name for name in NAMES if run.writes(name)]
    return [Tables(run.directory, names)] if names else []
