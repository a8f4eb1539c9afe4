"""Preemption by lot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import PREEMPTION_MODES, Need, Registry, Request, Victim, View, hookimpl, param


@dataclass
class RandomVictim(Victim):
    """Uniformly random among the running requests, a baseline."""

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return self.rng.sample(view.running, len(view.running))


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "random", RandomVictim)
