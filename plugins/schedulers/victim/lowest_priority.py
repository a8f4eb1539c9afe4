"""Least urgent first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import Need, Request, Victim, View, hookimpl


@dataclass
class LowestPriority(Victim):
    """The running request with the largest `tags.priority` goes first, among equals the newest (vLLM's priority scheduling)."""

    mode: str = "recompute"

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return sorted(view.running, key=lambda request: (-request.tags.priority, -request.index))


@hookimpl
def headway_register(registry):
    registry.add("victim", "lowest_priority", LowestPriority)
