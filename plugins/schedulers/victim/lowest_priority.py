"""Least urgent first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import PREEMPTION_MODES, Need, Registry, Request, Victim, View, hookimpl, param


@dataclass
class LowestPriority(Victim):
    """The running request with the largest `tags.priority` goes first, among equals the newest (vLLM's
    priority scheduling)."""

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return sorted(view.running, key=lambda request: (-request.tags.priority, -request.index))


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "lowest_priority", LowestPriority)
