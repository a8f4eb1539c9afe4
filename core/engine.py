"""The loop: arrivals -> plan -> launch ..(max_inflight - 1 steps later).. collect -> commit -> callbacks.

`max_inflight` is the whole of overlap and pipelining: 1 is synchronous and the reference, 2 hides the host
behind the device, `pp` keeps a pipeline full. The engine owns the loop, the plans in flight and the clock;
`Roster` the requests, `BlockPool` the blocks, `StepBuilder` the step that is being planned.

An engine serves any number of runs, one after the other. Counts, ids and outputs are those of one run. What
policies have learned and what is cached goes on from a run that finished; after one that was cut off, the
next begins with new state in everything but the executor.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial

from . import observers as observing
from .arrivals import ArrivalQueue, OnResult, checked, in_order
from .blocks import BlockPool
from .calls import Calls
from .clock import RecordingClock
from .compose.config import EngineConfig
from .context import Truth
from .counts import Counts
from .decisions import DecisionLog
from .errors import NothingPlanned
from .flights import Flights
from .handoff import Handoff, attach, detach
from .inbox import Inbox
from .inputs import Arrival
from .intake import Intake
from .ledger import Ledger
from .loop import run as whole_run
from .matching import Matches
from .outputs import RunResult, StopText
from .outside import Observer
from .patience import Patience
from .policy import Reject, Role
from .request import Request, RequestList
from .roles import Roles, check_limits, derived, num_blocks
from .roster import Roster
from .step import StepBuilder
from .view import View


class Engine:
    """Composes one object per role into a running system. roles: config node -> object, see
    `policy.ROLES`."""

    name = "python"  # among the loops of a run

    def __init__(
        self,
        roles: dict[str, Role],
        config: EngineConfig | None = None,
        *,
        seed: int = 0,
        observers: Sequence[Observer] = (),
        stop_text: StopText | None = None,
    ) -> None:
        """`stop_text` decides stop strings; it needs a tokenizer, so it comes from outside."""
        self.config = config = config or EngineConfig()
        self.calls = calls = Calls()
        self.observers = list(observers)
        self.roles = Roles.of(roles, calls)
        self.executor = executor = self.roles.executor
        check_limits(config, executor.caps, executor.plugin_name)
        self.clock = RecordingClock(executor.clock)
        count, size = num_blocks(config, executor), config.block_size
        self.pool = pool = BlockPool(count, size, self.roles.cache, self.roles.eviction, calls=calls)
        self.arrivals = ArrivalQueue(calls, self.roles.workload)
        matches = Matches(pool, calls)
        self.roster = Roster(
            pool,
            matches,
            calls,
            self.arrivals,
            max_num_seqs=config.max_num_seqs,
            most_preemptions=self.roles.most_preemptions(config.max_num_seqs),
            placeholders=executor.caps.placeholders and executor.caps.tokens_per_step == 1,
            retention=self.roles.retention,
            stop_text=partial(calls.call, executor, stop_text) if stop_text is not None else None,
        )
        self.ledger = Ledger(self.roster, pool, self.roles) if config.check else None
        longest, ledger = self.max_model_len, self.ledger
        self.intake = Intake(self.arrivals, self.roster, pool, executor, max_model_len=longest, ledger=ledger)
        self.builder = StepBuilder(self.roles, self.roster, pool, matches)
        self.view = calls.view = View(self.roles, self.roster, pool, matches, builder=self.builder)
        max_inflight = executor.caps.default_inflight if config.max_inflight is None else config.max_inflight
        self.flights = Flights(executor, calls, self.clock, max_inflight)
        self.decisions = DecisionLog()
        self.truth = Truth(self.roster.hidden_ends)
        self.patience, self.seed = Patience(calls), seed
        left_open = self.roles.left_open()
        self.roles.set_up(config, count, seed, self.truth)
        limits = {"num_blocks": count, "max_inflight": max_inflight, "max_model_len": self.max_model_len}
        self.derived = derived(left_open, config, limits)  # the same in every run
        executor.start(count, size, config.max_num_seqs, config.max_num_batched_tokens, seed)
        self.counts = Counts(self.roles, self.roster, pool)

    @property
    def max_model_len(self) -> int:
        return self.config.max_model_len or self.executor.caps.max_model_len

    @property
    def max_inflight(self) -> int:
        return self.flights.max_inflight

    @property
    def running(self) -> RequestList:
        return self.roster.running

    @property
    def waiting(self) -> RequestList:
        return self.roster.waiting

    @property
    def inbox(self) -> Inbox:
        """For a server: `open()` it before `run`; other threads may `add` and `abort` until it is closed."""
        return self.arrivals.inbox

    # ---- arrivals -----------------------------------------------------------------------------------------

    def add(self, arrival: Arrival) -> None:
        """One more request, at its time on the clock, or now if that has passed; from any thread
        (`inbox`)."""
        self.inbox.post(checked(arrival, "Engine.add: the arrival"))

    def abort(self, id: str) -> None:
        """Ends a request when the next turn begins, or when it arrives. At any moment, from any thread."""
        self.intake.abort(id)
        self.inbox.wake()

    def detach(self, id: str) -> Handoff | None:
        """Takes a request out with its KV, between two turns, for another engine to `attach`; None if
        gone."""
        now, collect = self.clock.now(), self._collect
        return detach(self.intake, self.roster, self.executor, id, now=now, collect=collect)

    def attach(self, handoff: Handoff) -> None:
        """Goes on with a request of another engine, which waits here from now on. Between two turns."""
        attach(self.intake, self.roster, self.executor, handoff, now=self.clock.now())

    def _ingest(self, now: float) -> None:
        if self.intake.ingest(now, self._welcome) + self.intake.end_aborted(now):
            self.patience.renew()

    def _welcome(self, request: Request, now: float) -> None:
        """Admission may refuse a request when it arrives; it is asked again before the request starts."""
        if self.roles.admission is not None:
            self.view.begin_step(self.counts.num_steps, now, len(self.flights))
            if isinstance(answer := self.roles.admit(request, self.view), Reject):
                self.roster.reject(request, answer.reason, now)

    # ---- one turn of the loop -----------------------------------------------------------------------------

    def step(self) -> bool:
        """Ingests, plans and launches if there is room in flight, else collects. False: nothing is left."""
        if self.arrivals.expecting:
            self.flights.linger()
        now = self.clock.now()
        self.pool.now = now
        self._ingest(now)
        self.roster.pins.expire(now)
        planned = False
        if not self.flights.full and (self.running.items or self.waiting.items):
            planned = True
            if self._plan(now):
                self.patience.renew()
                if self.flights.full:
                    self._collect()
                return True
        if self.flights:
            self._collect()
            return True
        return self._idle(now, self.builder.wake if planned else None)

    def _plan(self, now: float) -> bool:
        """One plan and its launch. False if nothing was decided."""
        began = time.thread_time()
        builder, counts, scheduler = self.builder, self.counts, self.roles.scheduler
        self.view.begin_step(counts.num_steps, now, len(self.flights))
        seqs = self.flights.seqs_of_a_plan(self.roles, self.roster, self.config.max_num_seqs)
        builder.begin(counts.num_steps, now, self.config.max_num_batched_tokens, seqs)
        self.calls.call(scheduler, scheduler.plan, builder, self.view)
        evicted, rejected = self.pool.take_evicted(), self.roster.take_rejected()
        launching = bool(builder.requests)
        plan = builder.build(self.roster.take_left() if launching else [])
        if self.ledger is not None:
            self.ledger.planned(plan)
        decided = launching or bool(plan.preempted or plan.paused or rejected)
        if decided:  # with nothing to run the state moved all the same; the executor hears of it later
            self.decisions.record(plan, evicted, rejected)
            counts.num_steps += 1
        spent = time.thread_time() - began
        counts.policy_time += spent
        if launching:
            counts.launched(plan)
            try:
                self.flights.launch(plan, spent, len(evicted))
            except BaseException:
                self.roster.put_back_left(plan.left)
                raise
        return decided

    def _collect(self) -> None:
        flight, result, tokens = self.flights.collect()
        now = self.clock.now()
        began = time.thread_time()
        self.pool.now = now
        done = self.roster.commit(flight.plan, tokens, now, result.logprobs)
        for request, reason in done.ended:
            self.roster.finish(request, reason, now)
        updating = time.thread_time() - began
        self.counts.collected(result, updating)
        record = self.counts.record(flight, result, done, now=now, updating=updating)
        self.calls.notify("on_step_end", record)
        if self.ledger is not None:
            self.ledger.collected(record.plan, record.tokens)
            self.pool.check()
        observing.tell(self.observers, self.calls, "on_step", record)
        observing.tell_ended(self.observers, self.calls, self.roster.take_ended())

    def _idle(self, now: float, wake: float | None) -> bool:
        """Nothing was planned and nothing is in flight: waits for what comes next. False if nothing does."""
        if (self.running.items or self.waiting.items) and wake is None:
            if not self.running.items and self.roster.holds_blocks_for_later and self.roster.reclaim():
                return True
            scheduler = self.roles.scheduler.plugin_name
            raise NothingPlanned(scheduler, self.counts.num_steps, self.view.describe())
        # Somebody may wait for an answer.
        observing.tell_ended(self.observers, self.calls, self.roster.take_ended())
        return self.patience.wait(self.clock, self.arrivals, now, wake=wake, waker=self.builder.waker)

    # ---- whole runs ---------------------------------------------------------------------------------------

    def run(self, arrivals: Iterable[Arrival] = (), on_result: OnResult | None = None) -> RunResult:
        """Runs until nothing is left. Ctrl-C and errors end the run but keep what was done; an error is
        raised again with the partial result as its `partial` attribute.

        Arrivals are at seconds since the run began; a list may be in any order, a stream is in order of time.
        What `on_result` answers is at times on the clock, as is all that comes out. The outputs are the
        result's: the engine forgets them when the next run begins.
        """
        return whole_run(self, arrivals, on_result)

    def begin(self, arrivals: Iterable[Arrival], on_result: OnResult | None) -> None:
        """The next run begins, with the loop where it stands. For `run`."""
        goes_on = bool(self.roster.present or self.flights)  # somebody turned the loop by hand
        if not goes_on:
            self.counts.begin(self.clock.inner.now() if self.counts.num_runs else 0.0)
            self.roster.begin_run()
            self.decisions.begin()
            self.clock.begin()
        self.counts.num_runs += 1
        arrivals = in_order(arrivals, self.roles.workload.plugin_name)
        if self.roles.know_the_future:
            arrivals = self.truth.future = list(arrivals)
        self.intake.begin_run(arrivals, forget=not goes_on)
        self.arrivals.on_result = on_result
        self.arrivals.stream(arrivals, self.counts.began)
        observing.tell(self.observers, self.calls, "on_start", self)

    def take_ended(self) -> list[Request]:
        return self.roster.take_ended()

    def result(self, status: str = "finished", error: str = "") -> RunResult:
        """What there is so far. Requests still in the system count as aborted, and the engine starts over."""
        now, counts, roster = self.clock.inner.now(), self.counts, self.roster
        cut_off = roster.abort_all(status, now)
        if rejected := roster.take_rejected():  # at arrival, with no plan after it
            self.builder.begin(counts.num_steps, now, 0, 0)
            self.decisions.record(self.builder.build([]), [], rejected)
        self.intake.end_run()
        about = {"decision_hash": self.decisions.hexdigest, "derived": dict(self.derived)}
        result = counts.result(now, status=status, error=error, **about)
        if cut_off or status != "finished":
            self._start_over()
        return result

    def _start_over(self) -> None:
        """After a run that was cut off anywhere: nothing in flight, held, cached or to come; new policies."""
        self.flights.discard()
        self.arrivals.clear()
        self.roster.clear()
        self.builder.copies.clear()
        if self.ledger is not None:
            self.ledger.clear()
        self.view.begin_step(self.counts.num_steps, self.view.now, 0)
        self.roles.set_up(self.config, self.pool.num_blocks, self.seed, self.truth)
