"""Static priorities."""

from __future__ import annotations

from dataclasses import dataclass

from headway import KeyOrder, Registry, Request, hookimpl


@dataclass
class Priority(KeyOrder):
    """Smallest `tags.priority` first, then by arrival (vLLM's `--scheduling-policy priority`).

    With scheduler=preemptive a waiting request also takes the place of a running one of lower priority.
    """

    may_starve = "requests of a higher priority may keep coming"

    def key(self, request: Request) -> int:
        return request.tags.priority


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "priority", Priority)
