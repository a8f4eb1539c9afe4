"""Program-level attained service."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import Context, KeyOrder, Registry, Request, StepRecord, View, hookimpl, param

from .alarms import Alarms


@dataclass
class Program:
    """What its completed calls have had."""

    served: float = 0.0  # seconds
    waited: float = 0.0  # seconds


@dataclass
class Call:
    """A request that has not ended. Seconds of service and of waiting: in all, and since it was last promoted
    (its window).
    """

    level: int
    attained: float = 0.0  # seconds of service in this level
    served: float = 0.0
    waited: float = 0.0
    window_served: float = 0.0
    window_waited: float = 0.0


@dataclass
class ProgramService(KeyOrder):
    """Autellix (Luo et al., arXiv 2502.13965, section 4): PLAS, the program whose completed calls were served
    least goes first.

    A program is a session (tags.session); a call without one is a program of its own.
    num_queues, quantum, ratio: queue i holds a call for quantum * ratio**i seconds of service, the last one
    for good. A call joins the queue in which its program stands: the first i for which its completed calls
    have had at most quantum * (1 + ... + ratio**i) seconds.
    beta: promote a call to the first queue once it and its program's completed calls have waited beta times
    as long as they were served. A promotion begins the call's window anew; what the program has had stays.

    A new call starts where its program stands, not at the top, which is what MLFQ over calls gets wrong for
    programs of many short calls; there it has a whole quantum. Service is the duration of the steps that held
    a call. Use scheduler=preemptive for preemption. Programs are never forgotten: state grows by a few
    words a session. Parallel calls of a program are weighed by their critical path in order=atlas.
    Differs: preemption recomputes, the paper swaps. Not here: routing long programs to one engine.
    """

    may_starve = "behind new programs a call waits beta times as long as its program was served"
    num_queues: int = param(8, min=1, max=64)
    quantum: float = param(0.1, min=1e-9, max=1e9, unit="seconds")
    ratio: float = param(2.0, min=1, max=1000)
    beta: float = param(10.0, above=0, max=1e9)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._quanta = [self.quantum * self.ratio**i for i in range(self.num_queues - 1)]
        self._quanta.append(float("inf"))
        # Service at which a program leaves queue i.
        self._limits = [sum(self._quanta[: i + 1]) for i in range(self.num_queues)]
        self._programs: dict[str, Program] = {}
        self._calls: dict[int, Call] = {}  # by request index
        self._ended: list[Request] = []  # in the step that comes back now: its time is theirs too
        self._since: dict[int, float] = {}  # waiting request index -> when it began to wait
        self._starving = Alarms()

    def program(self, request: Request) -> Program:
        """Its own, of which nothing is kept, where the request belongs to no session."""
        session = request.tags.session
        return self._programs.setdefault(session, Program()) if session else Program()

    def standing(self, request: Request) -> float:
        """Seconds of service that decide which queue a new call joins."""
        return self.program(request).served

    def completed(self, request: Request, call: Call) -> None:
        """A call has ended, and what it had is its program's."""
        program = self.program(request)
        program.served += call.served
        program.waited += call.waited

    def level(self, request: Request) -> int:
        """0 is the first queue."""
        return self._calls[request.index].level

    def key(self, request: Request) -> int:
        return self._calls[request.index].level

    def order(self, view: View) -> Iterable[Request]:
        for request in self._starving.pop_due(view.now):
            self._enter(request, 0)
            call = self._calls[request.index]
            # What it has waited so far is over; on_admit will count from when it began to wait.
            call.window_served, call.window_waited = 0.0, self._since[request.index] - view.now
        return super().order(view)

    def on_arrival(self, request: Request, now: float) -> None:
        served = self.standing(request)
        self._calls[request.index] = Call(next(i for i, limit in enumerate(self._limits) if served <= limit))
        super().on_arrival(request, now)
        self._wait(request, now)

    def on_preempt(self, request: Request, now: float) -> None:
        super().on_preempt(request, now)
        self._wait(request, now)

    def on_admit(self, request: Request, now: float) -> None:
        super().on_admit(request, now)
        self._starving.clear(request)
        call, waited = self._calls[request.index], now - self._since.pop(request.index)
        call.waited += waited
        call.window_waited += waited

    def on_step_end(self, record: StepRecord) -> None:
        spent = record.end - record.start
        for request in record.plan.requests:
            if (call := self._calls.get(request.index)) is not None:
                self._serve(request, call, spent)
        for request in self._ended:
            self.completed(request, self._calls.pop(request.index))
        self._ended.clear()

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._starving.clear(request)
        self._since.pop(request.index, None)
        self._ended.append(request)

    def _serve(self, request: Request, call: Call, seconds: float) -> None:
        call.served += seconds
        call.window_served += seconds
        call.attained += seconds
        if call.attained > self._quanta[call.level]:
            self._enter(request, call.level + 1)

    def _enter(self, request: Request, level: int) -> None:
        call = self._calls[request.index]
        call.level, call.attained = level, 0.0
        self.rekey(request)

    def _wait(self, request: Request, now: float) -> None:
        self._since[request.index] = now
        call, program = self._calls[request.index], self.program(request)
        due = self.beta * (program.served + call.window_served) - program.waited - call.window_waited
        self._starving.set(request, now + max(0.0, due))


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "plas", ProgramService)
