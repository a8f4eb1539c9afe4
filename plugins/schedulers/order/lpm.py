"""Longest prefix match."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Registry, Request, hookimpl

from .prefix import PrefixOrder


@dataclass
class LongestPrefix(PrefixOrder):
    """RadixAttention (SGLang, Zheng et al., NeurIPS'24, section 3): longest cached prefix first.

    As in SGLang's schedule_policy.py: ties by arrival, first come first served above `fcfs_above` waiting
    requests, and of requests that share a prefix which is not cached yet all but the first are put last
    (in-batch prefix caching).
    """

    may_starve = "requests with longer cached prefixes may keep coming"

    def rank(self, later: bool, cached: int, request: Request) -> tuple[bool, int]:
        return later, 0 if later else -cached


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "lpm", LongestPrefix)
