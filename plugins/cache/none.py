"""No prefix cache."""

from __future__ import annotations

from dataclasses import dataclass

from headway import PrefixCache, Registry, Request, hookimpl


@dataclass
class NoCache(PrefixCache):
    """Every prompt is computed in full; blocks are freed when their request ends."""

    enabled = False

    def match(self, request: Request, known: list[int], limit: int) -> list[int]:
        return []

    def insert(self, request: Request, parent: int, tokens: tuple[int, ...], block: int) -> int:
        return block

    def remove(self, block: int) -> None:
        raise KeyError(block)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("cache", "none", NoCache)
