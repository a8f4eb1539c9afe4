"""Last admitted, first preempted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import PREEMPTION_MODES, Context, Need, Registry, Request, Victim, View, hookimpl, param


@dataclass
class LastAdmitted(Victim):
    """The running request that was admitted last goes first, readmissions included (vLLM: the tail of its
    running list).

    Differs from victim=newest, which goes by arrival, where the order role is not first come first served,
    and after a preemption.
    """

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._running: dict[int, Request] = {}  # by index, in order of admission

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return list(reversed(self._running.values()))

    def on_admit(self, request: Request, now: float) -> None:
        self._running[request.index] = request

    def on_preempt(self, request: Request, now: float) -> None:
        self._running.pop(request.index, None)

    on_finish = on_preempt


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "last_admitted", LastAdmitted)
