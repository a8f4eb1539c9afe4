"""Preemption by lot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import Need, Request, Victim, View, hookimpl


@dataclass
class RandomVictim(Victim):
    """Uniformly random among the running requests, a baseline."""

    mode: str = "recompute"

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return self.rng.sample(view.running, len(view.running))


@hookimpl
def headway_register(registry):
    registry.add("victim", "random", RandomVictim)
