"""The run as tables: requests.parquet, steps.parquet and decisions.parquet in the run's directory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from headway import (
    Engine,
    Lists,
    Observer,
    RequestOutput,
    Run,
    RunResult,
    StepColumns,
    hookimpl,
    metrics,
    whole,
)

NAMES = ("requests.parquet", "steps.parquet", "decisions.parquet")


class Tables(Observer):
    """One row per request, per step and per decision. See docs/metrics.md for the columns. Steps come from
    the run's log."""

    plugin_name = "tables"

    def __init__(self, directory: Path, names: Collection[str] = NAMES) -> None:
        self.directory, self.names = directory, names

    def on_start(self, engine: Engine) -> None:
        self._files = ExitStack()
        self._writers: dict[str, Any] = {}
        self._problem: OSError | None = None  # a full disk ends no run, whose other files are written

    def read(self, steps: StepColumns) -> None:
        """Writes a piece of the log."""
        for name, rows in (("steps.parquet", _steps), ("decisions.parquet", _decisions)):
            if name in self.names and self._problem is None:
                self._write(name, rows(steps))

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


def _steps(steps: StepColumns) -> Any:
    import pyarrow as pa

    plain = (
        "step",
        "start",
        "end",
        "emitted",
        "policy_time",
        "num_running",
        "num_waiting",
        "kv_used",
        "kv_cached",
        "num_preempted",
        "num_evicted",
    )
    columns = {name: pa.array(steps.numbers[name]) for name in plain}
    for name in ("num_seqs", "num_tokens"):
        columns[name] = pa.array(steps.numbers[name], pa.int32())
    names, (seconds, offsets) = pa.array(steps.timing_names, pa.string()), steps.timings
    columns["timings"] = pa.MapArray.from_arrays(pa.array(offsets, pa.int32()), names, seconds)
    return pa.table(columns)


def _decisions(steps: StepColumns) -> Any:
    """Parallel lists a step, as in StepPlan; requests by index. A block list belongs to the allocation at its
    place."""
    import numpy as np
    import pyarrow as pa

    numbers, requests, allocations, sizes = (
        steps.numbers,
        steps.requests,
        steps.allocations,
        steps.allocation_sizes,
    )
    place, seqs = np.arange(len(requests.values)), numbers["num_seqs"]
    starts = steps.chunks.values[place + np.repeat(requests.offsets[:-1], seqs)]
    lengths = steps.chunks.values[place + np.repeat(requests.offsets[1:], seqs)]
    ends = np.cumsum(sizes.values + 2)  # of each allocation: request, first place, blocks
    begins = ends - sizes.values - 2
    is_block = np.ones(len(allocations.values), bool)
    is_block[begins] = is_block[begins + 1] = False
    blocks = Lists(allocations.values[is_block], np.concatenate([[0], np.cumsum(sizes.values)]))
    return pa.table(
        {
            "step": pa.array(numbers["step"]),
            "now": pa.array(numbers["now"]),
            "requests": _lists(requests),
            "starts": _lists(Lists(starts, requests.offsets)),
            "lengths": _lists(Lists(lengths, requests.offsets)),
            "preempted": _lists(steps.preempted),
            "allocated_requests": _lists(Lists(allocations.values[begins], sizes.offsets)),
            "allocated_first": _lists(Lists(allocations.values[begins + 1], sizes.offsets)),
            "allocated_blocks": pa.ListArray.from_arrays(pa.array(sizes.offsets, pa.int32()), _lists(blocks)),
        }
    )


def _lists(lists: Lists) -> Any:
    """A column of int32 lists."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(lists.offsets, pa.int32()), pa.array(lists.values, pa.int32()))


def _requests(outputs: list[RequestOutput]) -> Any:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    plain = {
        "id": text,
        "index": whole,
        "state": text,
        "finish_reason": text,
        "arrival_time": real,
        "first_scheduled_time": real,
        "finish_time": real,
        "num_prompt_tokens": whole,
        "num_cached_tokens": whole,
        "num_preemptions": whole,
        "num_recomputed_tokens": whole,
        "prompt": text,
        "text": text,
    }
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
def headway_observers(run: Run) -> Sequence[Observer]:
    names = [name for name in NAMES if run.writes(name)]
    if run.directory is None or not names:
        return []
    tables = Tables(run.directory, names)
    run.step_log.readers.append(tables.read)
    return [tables]
