"""Drop what is cached."""

from __future__ import annotations

from dataclasses import dataclass

from headway import KVControl, Request, Retention, hookimpl


@dataclass
class Drop(Retention):
    """Blocks of a finished request are forgotten at once, where nobody else holds them: the baseline without reuse over time."""

    def retain(self, request: Request, kv: KVControl, now: float) -> None:
        kv.drop(request)


@hookimpl
def headway_register(registry):
    registry.add("retention", "drop", Drop)
