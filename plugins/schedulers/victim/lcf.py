"""Least computed first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import PREEMPTION_MODES, Need, Registry, Request, Victim, View, hookimpl, param


@dataclass
class LeastComputed(Victim):
    """LCF (vLLM issue #54644): the running request with the fewest computed tokens goes first, since it has
    the least to recompute.

    Among equals the newest. Tokens in flight count as computed.
    """

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return sorted(
            view.running,
            key=lambda request: (request.num_computed_tokens + request.num_scheduled_tokens, -request.index),
        )


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "lcf", LeastComputed)
