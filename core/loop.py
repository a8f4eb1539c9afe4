"""A whole run: turns of a loop until nothing is left, and an end that keeps what was done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from . import observers as observing
from .arrivals import OnResult
from .calls import Calls
from .collecting import rare_collections
from .inputs import Arrival
from .interrupts import interrupts
from .outputs import RunResult
from .outside import Observer
from .request import Request


class Loop(Protocol):
    """What goes through a run turn by turn: an `Engine`, or what stands in for it (`headway_stand_in`)."""

    name: str  # as results call it

    @property
    def calls(self) -> Calls: ...

    @property
    def observers(self) -> Sequence[Observer]: ...

    def begin(self, arrivals: Iterable[Arrival], on_result: OnResult | None) -> None:
        """A new run: its arrivals, and what follows an answer. Observers hear of it."""

    def step(self) -> bool:
        """One turn, or many. False: nothing is left."""

    def result(self, status: str = "finished", error: str = "") -> RunResult:
        """What there is so far. Requests still in the system count as aborted."""

    def take_ended(self) -> list[Request]:
        """Who has ended, and observers have not heard of it."""


def run(loop: Loop, arrivals: Iterable[Arrival], on_result: OnResult | None) -> RunResult:
    """Runs until nothing is left. Ctrl-C and errors end the run but keep what was done; an error is raised
    again with the partial result as its `partial` attribute."""
    with rare_collections():
        return _run(loop, arrivals, on_result)


def _run(loop: Loop, arrivals: Iterable[Arrival], on_result: OnResult | None) -> RunResult:
    status, problem = "finished", None
    try:
        with interrupts.stepping():
            loop.begin(arrivals, on_result)
            while loop.step():
                interrupts.check()
    except BaseException as error:
        status, problem = ("interrupted", None) if interrupts.caused(error) else ("failed", error)
    result = loop.result(status, str(problem) if problem else "")
    result.loop = loop.name
    unclosed = observing.close(loop.observers, loop.calls, loop.take_ended(), result)
    if (problem := problem or unclosed) is not None:
        problem.partial = result  # type: ignore[attr-defined]
        raise problem
    return result
