"""Last come, first preempted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import PREEMPTION_MODES, Need, Registry, Request, Victim, View, hookimpl, param


@dataclass
class Newest(Victim):
    """The running request that arrived last goes first (vLLM, SOSP'23, section 4.5: first come first served,
    so the latest yields).

    By arrival, as in vLLM's first releases and Sarathi-Serve, which sort what runs by it. vLLM v1 takes the
    request that was admitted last: victim=last_admitted.
    """

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return reversed(view.running)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("victim", "newest", Newest)
