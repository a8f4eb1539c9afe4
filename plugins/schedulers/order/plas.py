"""Program-level attained service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headway import Context, KeyOrder, Request, StepRecord, View, hookimpl, param

from .alarms import Alarms


@dataclass
class _Program:
    served: float = 0.0  # seconds of service of all its calls, ended ones included
    waited: float = 0.0  # seconds its calls have waited since the last promotion
    served_at_promotion: float = 0.0


@dataclass
class ProgramService(KeyOrder):
    """Autellix (Luo et al., arXiv 2502.13965, section 4): PLAS, the program that was served least goes first.

    A program is a session (tags.session), or a client where there is none; its calls share one level of K queues, by the service that
    the program has attained so far.
    num_queues, quantum, ratio: a program leaves level i when its service exceeds quantum * (1 + ratio + ... + ratio**i) seconds.
    beta: promote a call to the first level once its program has waited beta times as long as it was served, since the last promotion.

    A new call starts where its program stands, not at the top, which is what MLFQ over calls gets wrong for programs of many short calls.
    Service is the duration of the steps that held a call. Use scheduler=preemptive for preemption; it recomputes, the paper swaps.
    Programs are never forgotten: state grows by a few words a session.
    """

    num_queues: int = param(8, min=1, max=64)
    quantum: float = param(0.1, min=1e-9, max=1e9, unit="seconds")
    ratio: float = param(2.0, min=1, max=1000)
    beta: float = param(10.0, above=0, max=1e9)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._limits: list[float] = []  # service at which a program leaves level i
        total = 0.0
        for i in range(self.num_queues - 1):
            total += self.quantum * self.ratio**i
            self._limits.append(total)
        self._limits.append(float("inf"))
        self._programs: dict[str, _Program] = {}
        self._levels: dict[int, int] = {}  # request index -> level
        self._since: dict[int, float] = {}  # waiting request index -> when it began to wait
        self._starving = Alarms()

    def program(self, request: Request) -> _Program:
        name = request.tags.session or request.tags.client
        if (found := self._programs.get(name)) is None:
            found = self._programs[name] = _Program()
        return found

    def key(self, request: Request) -> int:
        return self._levels[request.index]

    def order(self, view: View) -> Sequence[Request]:
        for request in self._starving.ring(view.now):
            program = self.program(request)
            program.waited, program.served_at_promotion = 0.0, program.served
            self._levels[request.index] = 0
            self.rekey(request)
        return super().order(view)

    def on_arrival(self, request: Request, now: float) -> None:
        served = self.program(request).served
        self._levels[request.index] = next(i for i, limit in enumerate(self._limits) if served <= limit)
        super().on_arrival(request, now)
        self._wait(request, now)

    def on_preempt(self, request: Request, now: float) -> None:
        super().on_preempt(request, now)
        self._wait(request, now)

    def on_admit(self, request: Request, now: float) -> None:
        super().on_admit(request, now)
        self._starving.clear(request)
        self.program(request).waited += now - self._since.pop(request.index)

    def on_step_end(self, record: StepRecord) -> None:
        spent, levels, limits = record.end - record.start, self._levels, self._limits
        for request in record.plan.requests:
            program = self.program(request)
            program.served += spent
            # A promoted call sinks again from where its program stands, so it is served for one step at least.
            if program.served > limits[levels.get(request.index, -1)]:
                levels[request.index] += 1
                self.rekey(request)

    def on_finish(self, request: Request, now: float) -> None:
        super().on_finish(request, now)
        self._starving.clear(request)
        self._since.pop(request.index, None)
        self._levels.pop(request.index, None)

    def _wait(self, request: Request, now: float) -> None:
        self._since[request.index] = now
        program = self.program(request)
        self._starving.set(request, now + max(0.0, self.beta * (program.served - program.served_at_promotion) - program.waited))


@hookimpl
def headway_register(registry):
    registry.add("order", "plas", ProgramService)
