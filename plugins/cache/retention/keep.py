"""Keep what is cached."""

from __future__ import annotations

from dataclasses import dataclass

from headway import KVControl, Registry, Request, Retention, hookimpl


@dataclass
class Keep(Retention):
    """Blocks of a finished request stay cached until they are evicted; the same as no retention policy."""

    def retain(self, request: Request, kv: KVControl, now: float) -> None:
        pass


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("retention", "keep", Keep)
