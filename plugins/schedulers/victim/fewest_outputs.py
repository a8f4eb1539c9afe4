"""Fewest generated tokens first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import PREEMPTION_MODES, Need, Registry, Request, Victim, View, hookimpl, param


@dataclass
class FewestOutputs(Victim):
    """SGLang's retraction (managers/schedule_batch.py): the running request with the fewest generated tokens
    goes first.

    Among equals the one with the longest prompt.
    """

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return sorted(view.running, key=lambda r: (r.num_output_tokens, -r.num_prompt_tokens, -r.index))


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "fewest_outputs", FewestOutputs)
