"""Whom the order would serve last, first preempted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from headway import (
    PREEMPTION_MODES,
    Context,
    KeyOrder,
    Need,
    Registry,
    Request,
    Victim,
    View,
    hookimpl,
    param,
)


@dataclass
class PauseFirst(Victim):
    """The request that the order would serve last goes first, of the paused ones and then of those that run
    (FastServe, arXiv 2305.05920, its proactive management of the KV cache).

    For scheduler=preemptive, which pauses. An order without a key (fcfs, lpm, vtc) ranks nobody who runs:
    then the last to arrive goes first. Differs: FastServe estimates when each job is served next, from its
    queue and when it will be promoted, and moves KV to the host before memory is short; here the order's
    ranking now decides, and memory pressure.
    """

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        order = ctx.roles["order"]
        self._rank: Callable[[Request], Any] = order.rank if isinstance(order, KeyOrder) else _age

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return self._last_first(view.running)

    def paused(self, need: Need, view: View) -> Iterable[Request]:
        return self._last_first(view.paused)

    def _last_first(self, requests: Iterable[Request]) -> list[Request]:
        return sorted(requests, key=self._rank, reverse=True)


def _age(request: Request) -> tuple[float, int]:
    return request.sort_key


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "pause_first", PauseFirst)
