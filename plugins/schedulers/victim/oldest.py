"""First come, first preempted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import PREEMPTION_MODES, Need, Registry, Request, Victim, View, hookimpl, param


@dataclass
class Oldest(Victim):
    """The running request that arrived first goes first: a baseline that loses the most finished work."""

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return view.running


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "oldest", Oldest)
