"""StepLog: the steps of a run as columns, written once and read by every observer that makes a file of them.

A step's numbers are copied into arrays that grow, so no plan, request or list of the engine stays alive. The
readers get them in pieces of at most `MOST_STEPS` steps, the last one maybe empty, and after that the arrays
are empty again. A log holds 144 bytes per step, 24 per planned request, 8 per allocated block and 24 per
allocation: about 50 MB at most before a piece is handed over, and as much again while it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..outside import Observer, StepRecord

if TYPE_CHECKING:
    import numpy as np

MOST_STEPS = 4096
MOST_NUMBERS = 2_000_000  # planned requests, allocated blocks

#: Columns of whole numbers, then of seconds: a StepRecord's, and its plan's.
COUNTS = (
    "step",
    "emitted",
    "num_running",
    "num_waiting",
    "kv_used",
    "kv_cached",
    "num_preempted",
    "num_evicted",
    "num_seqs",
    "num_tokens",
)
TIMES = ("start", "end", "policy_time", "now")
_EXTENTS = ("num_allocations", "num_allocated_numbers", "num_timings", "num_more")
_WIDTH = len(COUNTS) + len(_EXTENTS)


class Lists(NamedTuple):
    """A list of numbers per step, one behind the other: step i's are values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]


@dataclass(frozen=True)
class StepColumns:
    """Consecutive steps, as columns of numpy. Requests are named by index; parallel lists are as in
    StepPlan."""

    numbers: dict[str, np.ndarray[Any, Any]]  # by name, see COUNTS and TIMES
    requests: Lists
    chunks: Lists  # per step all starts, then all lengths
    # per step, for each request that was given several tokens: its place in the plan, how many beyond one
    more: Lists
    preempted: Lists
    allocations: Lists  # per step and allocation: the request, the first place in its table, the blocks
    allocation_sizes: Lists  # per step: how many blocks each allocation has
    timing_names: list[str]  # of the executor's own timings, step after step
    timings: Lists  # seconds, at the places of their names

    @classmethod
    def of(
        cls,
        counts: np.ndarray[Any, Any],
        times: np.ndarray[Any, Any],
        *,
        requests: Any,
        chunks: Any,
        preempted: Any,
        allocations: Any,
        sizes: Any,
        more: Any = (),
        timing_names: Sequence[str] = (),
        seconds: Any = (),
    ) -> StepColumns:
        """From a row of whole numbers per step (COUNTS, then extents), a row of TIMES, and what the lists
        hold, one behind the other."""
        numbers = dict(zip((*COUNTS, *_EXTENTS), counts.T, strict=True)) | dict(
            zip(TIMES, times.T, strict=True)
        )
        num_allocations, values, timings, num_more = (numbers.pop(name) for name in _EXTENTS)
        return cls(
            numbers=numbers,
            requests=_lists(requests, numbers["num_seqs"]),
            chunks=_lists(chunks, 2 * numbers["num_seqs"]),
            more=_lists(more, num_more),
            preempted=_lists(preempted, numbers["num_preempted"]),
            allocations=_lists(allocations, values),
            allocation_sizes=_lists(sizes, num_allocations),
            timing_names=list(timing_names[: int(timings.sum())]),
            timings=_lists(seconds, timings),
        )


class StepLog(Observer):
    """The observer that fills the columns. It stands before its readers in an engine's list of observers: at
    the end of a run they have heard of every step before they are closed."""

    plugin_name = "step log"

    def __init__(self, *readers: Callable[[StepColumns], None]) -> None:
        self.readers = list(readers)
        self._begin()

    def on_start(self, engine: Any) -> None:
        self._begin()

    def _begin(self) -> None:
        self._counts, self._times = array("q"), array("d")
        self._requests, self._chunks, self._preempted = array("q"), array("q"), array("q")
        self._allocations, self._sizes, self._more = array("q"), array("q"), array("q")
        self._names: list[str] = []
        self._seconds = array("d")

    def on_step(self, record: StepRecord) -> None:
        plan, timings, before_more = record.plan, record.timings, len(self._more)
        self._requests.extend([request.index for request in plan.requests])
        self._chunks.extend(plan.starts)
        self._chunks.extend(plan.lengths)
        before = len(self._allocations)
        for request, first, blocks in plan.allocated:
            self._allocations.extend((request.index, first, *blocks))
            self._sizes.append(len(blocks))
        if plan.preempted:
            self._preempted.extend([request.index for request in plan.preempted])
        for place, rest in record.tokens.more.items():
            self._more.extend((place, len(rest)))
        if timings:
            self._names.extend(timings)
            self._seconds.extend(timings.values())
        self._times.extend((record.start, record.end, record.policy_time, plan.now))
        self._counts.extend(
            (
                record.step,
                record.emitted,
                record.num_running,
                record.num_waiting,
                record.kv_used,
                record.kv_cached,
                len(plan.preempted),
                record.num_evicted,
                len(plan.requests),
                plan.num_tokens,
                len(plan.allocated),
                len(self._allocations) - before,
                len(timings),
                len(self._more) - before_more,
            )
        )
        if (
            len(self._counts) >= MOST_STEPS * _WIDTH
            or len(self._requests) + len(self._allocations) >= MOST_NUMBERS
        ):
            self._flush()

    @property
    def piece(self) -> tuple[int, int]:
        """Steps, and planned requests and allocated blocks, after which readers get what there is."""
        return MOST_STEPS, MOST_NUMBERS

    def close(self, result: Any) -> None:
        self._flush()

    def _flush(self) -> None:
        columns = self._columns()
        self._begin()
        self.hand(columns)

    def hand(self, columns: StepColumns) -> None:
        """To every reader, also when another one fails. For whoever fills columns in this log's place."""
        problem: Exception | None = None
        for read in self.readers:
            try:
                read(columns)
            except Exception as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def _columns(self) -> StepColumns:
        """A step's counts are written last, so one that was cut off while it was logged is left out."""
        import numpy as np

        counts = np.array(self._counts, np.int64).reshape(-1, _WIDTH)
        return StepColumns.of(
            counts,
            np.array(self._times, np.float64).reshape(-1, len(TIMES))[: len(counts)],
            requests=self._requests,
            chunks=self._chunks,
            more=self._more,
            preempted=self._preempted,
            allocations=self._allocations,
            sizes=self._sizes,
            timing_names=self._names,
            seconds=self._seconds,
        )


def _lists(values: Any, sizes: np.ndarray[Any, Any]) -> Lists:
    import numpy as np

    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return Lists(np.array(values)[: offsets[-1]], offsets)
