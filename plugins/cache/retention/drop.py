"""Drop what is cached."""

from __future__ import annotations

from dataclasses import dataclass

from headway import KVControl, Registry, Request, Retention, hookimpl


@dataclass
class Drop(Retention):
    """Blocks of a finished request are forgotten at once, where nobody else holds them: the baseline without
    reuse over time."""

    def retain(self, request: Request, kv: KVControl, now: float) -> None:
        kv.drop(request)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("retention", "drop", Drop)
