"""Eviction by the priority of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway import Block, KeyEviction, Registry, hookimpl


@dataclass
class LeastUrgent(KeyEviction):
    """Blocks last touched by the least urgent request (largest priority number, as in vLLM), then by LRU
    (SGLang's "priority")."""

    def key(self, block: Block) -> Any:
        return (-block.tags.priority, block.last_access)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "priority", LeastUrgent)
