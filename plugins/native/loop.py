"""A run that goes through the compiled engine: arrivals in, what came of them out.

Arrivals are read, numbered and refused by the engine's own queue and intake, one by one and when it would
have read them. The compiled engine comes back when it must know the next arrival, and every few thousand
steps.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from headway import (
    Arrival,
    InvariantError,
    NothingPlanned,
    Observer,
    Request,
    RequestOutput,
    Run,
    RunResult,
    readable,
    root_key,
)
from plugins.schedulers.chunked import ChunkedPrefill

from .columns import ENDED, NativeColumns, values, words, words_of_list
from .library import ArrivalRow, Column, Counts, Setup, Terms
from .requests import REASONS, Elsewhere, NativeRequest, ended

FINISHED, WANTS_ARRIVAL, PAUSED, STUCK = range(4)  # Pause in source/engine.h
NEVER = 2**63 - 1


class NativeLoop:
    """Stands in for the engine of one run."""

    name = "native"

    def __init__(self, run: Run, library: ctypes.CDLL) -> None:
        self._engine, self._library = run.engine, library
        self.calls = run.engine.calls
        self._columns = NativeColumns(run)
        self.observers: list[Observer] = [
            self._columns if o is run.step_log else o for o in run.engine.observers
        ]
        # where no file is written of the steps, somebody may watch them
        if self._columns not in self.observers:
            self.observers.insert(0, self._columns)
        self._handle: Any = None
        self._alive: list[Any] = []
        self._salts: dict[str, int] = {}
        self._present: dict[int, tuple[Request, str]] = {}  # by index; with the reason of a refusal
        self._outputs: list[RequestOutput] = []
        self._ended: list[Request] = []
        self._policy_time = self._untold_time = 0.0

    def begin(self, arrivals: Iterable[Arrival], on_result: Any) -> None:
        engine = self._engine
        engine.begin(arrivals, on_result)
        self._arrivals = engine.arrivals.until(math.inf)
        self._handle = self._library.headway_new(ctypes.byref(self._setup()))
        if not self._handle:
            raise MemoryError("the compiled engine cannot be made")
        self._columns.attach(self._library, self._handle)

    def _setup(self) -> Setup:
        engine, config = self._engine, self._engine.config
        executor: Any = engine.executor
        scheduler: Any = engine.roles.scheduler
        cost = executor.roofline
        setup = Setup(
            max_num_seqs=config.max_num_seqs,
            most_preemptions=engine.roles.most_preemptions(config.max_num_seqs),
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_inflight=engine.max_inflight,
            num_blocks=engine.pool.num_blocks,
            block_size=engine.pool.block_size,
            placeholders=executor.caps.placeholders,
            caches=engine.roles.cache.enabled,
            logs=self._columns.wanted,
            pause_steps=self._columns.most_steps,
            pause_numbers=self._columns.most_numbers,
            pp=cost.pp,
            step_overhead=cost.hardware.step_overhead,
            charge=executor.charge_policy_time,
        )
        setup.coefficients[:] = cost.coefficients()
        if (measured := executor.measured) is not None:
            setup.measured = True
            setup.terms[0], setup.terms[1] = self._terms(measured.decode), self._terms(measured.mixed)
        if isinstance(scheduler, ChunkedPrefill):
            setup.chunked, setup.token_budget = True, scheduler.token_budget
            setup.chunk_size = NEVER if scheduler.chunk_size is None else scheduler.chunk_size
            setup.whole_prompts = scheduler.admit_on == "prompt"
        else:
            setup.watermark = int(scheduler.watermark * engine.pool.num_blocks)
        return setup

    def _terms(self, terms: Any) -> Terms:
        """As the compiled engine reads them, while this loop lives."""
        arrays = [
            np.array(terms.knots, np.int64),
            np.array(terms.slopes, np.float64),
            np.array(terms.sizes, np.int64),
        ]
        self._alive += arrays
        return Terms(
            floor=terms.floor,
            sequence=terms.sequence,
            decode_context=terms.decode_context,
            prompt_context=terms.prompt_context,
            pair=terms.pair,
            **dict(zip(("knots", "slopes", "sizes"), (array.ctypes.data for array in arrays), strict=True)),
            num_knots=len(terms.knots),
            num_sizes=len(terms.sizes),
        )

    def step(self) -> bool:
        if aborted := self._engine.intake.take_aborted():
            self._abort(aborted)
        began = time.thread_time()
        pause = self._library.headway_run(self._handle)
        self._untold_time += time.thread_time() - began
        if pause == WANTS_ARRIVAL:
            self._feed()
        elif pause in (FINISHED, PAUSED):
            self._tell()
        else:
            counts = self._counts()
            left = f"compiled engine: {counts.num_running} run, {counts.num_waiting} wait at {counts.now} s"
            if pause == STUCK:
                raise NothingPlanned(self._engine.roles.scheduler.plugin_name, counts.num_steps, left)
            raise InvariantError(f"{left}, and it cannot go on: run this with engine.native=never")
        return bool(pause != FINISHED)

    def _abort(self, ids: set[str]) -> None:
        """Engine.abort was called: heard whenever the compiled engine comes back."""
        for index, (request, refusal) in self._present.items():
            if request.id not in ids or refusal:
                continue
            if self._library.headway_abort(self._handle, index):
                self._present[index] = request, "abort"
            else:  # it was read, and has not arrived
                self._engine.intake.abort(request.id)

    # ---- arrivals ------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._library.headway_arrivals_end(self._handle)
            return
        intake = self._engine.intake
        executor: Any = self._engine.executor
        prompt, arrival, unreadable = _read(arrival, self._engine.max_model_len)
        if prompt is None:
            request = intake.numbered(arrival, Request)
            known = request.token_ids
            ends = (min(known), max(known)) if known and not unreadable else (0, 0)
        else:
            lengthy = replace(arrival, prompt_token_ids=Elsewhere(len(prompt)))
            request = native = intake.numbered(lengthy, NativeRequest)
            native.words, ends = prompt, (int(prompt.min()), int(prompt.max()))
        refusal = unreadable or intake.refusal(request, arrival.output_len, ends)
        intake.ids.add(request.id)
        self._present[request.index] = request, refusal
        low, size, base, stride = executor.stream(request)
        stops = [] if refusal else sorted(t for t in request.stop_tokens if low <= t < low + size)
        salt = self._salts.setdefault(request.cache_salt, -1 - len(self._salts))
        row = ArrivalRow(
            index=request.index,
            num_prompt_tokens=request.num_prompt_tokens,
            max_num_tokens=request.max_num_tokens,
            hidden_end=NEVER
            if arrival.output_len is None
            else request.num_prompt_tokens + int(arrival.output_len),
            low=low,
            size=size,
            base=base,
            stride=stride,
            root_key=root_key(request.cache_salt),
            salt=salt,
            refused=bool(refusal),
            num_stop_tokens=len(stops),
            time=arrival.time,
        )
        address = None if prompt is None else prompt.ctypes.data
        if not self._library.headway_arrive(
            self._handle, row, address, (ctypes.c_int64 * len(stops))(*stops)
        ):
            raise MemoryError(f"no memory is left for request {request.id}")

    # ---- what came of them ---------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Observers hear of the steps and the endings since the last time."""
        spent, self._untold_time = self._untold_time, 0.0
        self._policy_time += spent
        self.calls.call(self._columns, lambda: self._columns.flush(spent, full=True))
        self._take()
        if heard := self.take_ended():
            for observer in self.observers:
                self.calls.call(observer, observer.on_requests, heard)

    def _take(self) -> None:
        """Requests that have ended, and readings of the clock."""
        columns = (Column * 3)()
        self._library.headway_ended(self._handle, columns)
        rows = values(columns[0], ENDED).tolist()
        tokens, times = values(columns[1], "i8").tolist(), values(columns[2], "f8").tolist()
        at = 0
        for row in rows:
            request, refusal = self._present.pop(row[0])
            until = at + row[6]
            ended(
                request, row, tokens[at:until], times[at:until], REASONS[row[2]] or refusal or self._cut_off
            )
            at = until
            self._outputs.append(RequestOutput.of(request))
            self._ended.append(request)
        readings = Column()
        self._library.headway_readings(self._handle, ctypes.byref(readings))
        self._engine.clock.keep(values(readings, "f8").tolist())

    def take_ended(self) -> list[Request]:
        heard, self._ended = self._ended, []
        return heard

    _cut_off = ""  # how the run ended for those that were left

    def result(self, status: str = "finished", error: str = "") -> RunResult:
        engine = self._engine
        counts = Counts()
        if self._handle:
            self._cut_off = status
            self._library.headway_abort_all(self._handle)
            self._take()
            counts = self._counts()
            engine.clock.inner.advance_to(counts.now)
        engine.intake.end_run()
        prepared = engine.executor.preparation
        return RunResult(
            outputs=sorted(self._outputs, key=lambda output: output.index),
            duration=engine.clock.inner.now() - engine.counts.began,
            num_steps=counts.num_steps,
            policy_time=self._policy_time + self._untold_time,
            busy_time=counts.busy_time,
            kv_total=engine.pool.num_blocks,
            kv_peak=counts.kv_peak,
            num_evictions=counts.num_evictions,
            num_preemptions=counts.num_preemptions,
            planned_tokens=counts.planned_tokens,
            decision_hash=bytes(counts.digest).hex() if self._handle else engine.decisions.hexdigest,
            status=status,
            error=error,
            saw_truth=engine.roles.saw_truth(counts.num_evictions),
            warmup_seconds=prepared.seconds,
            late_preparations=prepared.late,
            step_time_basis=engine.executor.step_time_basis,
            time_model=engine.executor.time_model,
            derived=dict(engine.derived),
        )

    def _counts(self) -> Counts:
        counts = Counts()
        self._library.headway_counts(self._handle, ctypes.byref(counts))
        return counts

    def __del__(self) -> None:
        if self._handle:
            self._library.headway_free(self._handle)


def _read(arrival: Arrival, max_model_len: int) -> tuple[Any, Arrival, str]:
    """The prompt as 64-bit words, None for one that is refused already; the arrival in plain types, and what
    is wrong with these."""
    prompt = None if arrival.refusal else words(arrival.prompt_token_ids)
    if prompt is not None and 0 < len(prompt) < max_model_len:
        _, unreadable = readable(replace(arrival, prompt_token_ids=[]))
        if not unreadable:
            return prompt, arrival, ""
    arrival, unreadable = readable(arrival)
    if unreadable or not 0 < len(arrival.prompt_token_ids) < max_model_len:
        return None, arrival, unreadable
    try:
        return words_of_list(arrival.prompt_token_ids), arrival, ""
    except OverflowError:
        return None, arrival, ""
