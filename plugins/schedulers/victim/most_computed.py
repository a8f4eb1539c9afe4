"""Most computed first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import PREEMPTION_MODES, Need, Registry, Request, Victim, View, hookimpl, param


@dataclass
class MostComputed(Victim):
    """The running request with the most computed tokens goes first: fewest preemptions, most recomputation
    (MCF in vLLM issue #54644).

    Among equals the newest. Tokens in flight count as computed.
    """

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return sorted(
            view.running,
            key=lambda request: (-request.num_computed_tokens - request.num_scheduled_tokens, -request.index),
        )


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "most_computed", MostComputed)
