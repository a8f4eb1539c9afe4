"""Arrays between Python and the compiled engine, and the columns that take the place of the run's step
log."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway import Observer, Run, StepColumns

from .library import Column

#: A row of HeadwayEnded in source/headway.cpp.
ENDED = np.dtype(
    [(f"count{i}", np.int64) for i in range(7)]
    + [("first_scheduled_time", np.float64), ("finish_time", np.float64)]
)
_COUNTS, _TIMES = 12, 3  # numbers per step in source/log.h


def values(column: Column, kind: Any) -> Any:
    """A copy of what the column holds."""
    dtype = np.dtype(kind)
    if not column.length:
        return np.zeros(0, dtype)
    return np.frombuffer(
        (ctypes.c_char * (column.length * dtype.itemsize)).from_address(column.values), dtype
    ).copy()


def words(prompt: Sequence[int]) -> Any:
    """A prompt of whole numbers as an array of 64-bit words, at the speed of memory; None where it is
    no array and offers none."""
    if not hasattr(prompt, "__array__"):
        return None
    made = np.asarray(prompt)
    whole = made.ndim == 1 and made.dtype.kind in "iu" and np.can_cast(made.dtype, np.int64)
    return np.ascontiguousarray(made, np.int64) if whole else None


def words_of_list(prompt: Sequence[int]) -> Any:
    """The same for a list of ints. Raises OverflowError for one of more than 64 bits."""
    return np.frombuffer(array("q", prompt), np.int64)


class NativeColumns(Observer):
    """Stands where the step log stands among the observers: hands its readers the compiled engine's
    steps, in the same pieces.

    An observer of every step that has `on_steps(columns)` is told of the same pieces."""

    plugin_name = "step log"

    def __init__(self, run: Run) -> None:
        self._log = run.step_log
        self._watching = [
            observer.on_steps for observer in run.engine.observers if hasattr(observer, "on_steps")
        ]
        self.wanted = bool(self._log.readers or self._watching)
        self.most_steps, self.most_numbers = self._log.piece
        self._library: Any = None

    def attach(self, library: ctypes.CDLL, handle: Any) -> None:
        self._library, self._handle = library, handle
        self._spent = 0.0

    def flush(self, spent: float, *, full: bool) -> None:
        """Hands over what there is, or only a `full` piece. `spent`: CPU seconds since the last call."""
        self._spent += spent
        if not self.wanted or self._library is None:
            return
        columns = (Column * 7)()
        self._library.headway_log(self._handle, columns)
        steps, numbers = columns[0].length // _COUNTS, columns[1].length + columns[4].length
        if full and steps < self.most_steps and numbers < self.most_numbers:
            return
        counts, requests, chunks, preempted, allocations, sizes = (
            values(column, np.int64) for column in columns[:6]
        )
        start, end, now = values(columns[6], np.float64).reshape(-1, _TIMES).T
        self._library.headway_clear_log(self._handle)
        share = np.full(steps, self._spent / max(1, steps))  # nobody can measure so short a step by itself
        self._spent = 0.0
        made = StepColumns.of(
            np.column_stack([counts.reshape(-1, _COUNTS), np.zeros((steps, 2), np.int64)]),
            np.column_stack([start, end, share, now]),
            requests=requests,
            chunks=chunks,
            preempted=preempted,
            allocations=allocations,
            sizes=sizes,
        )
        for tell in self._watching:
            tell(made)
        self._log.hand(made)

    def close(self, result: Any) -> None:
        self.flush(0.0, full=False)
