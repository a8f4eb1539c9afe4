"""Longest prefix match."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import Request, View, hookimpl

from .prefix import FCFS_ABOVE, PrefixOrder


@dataclass
class LongestPrefix(PrefixOrder):
    """RadixAttention (SGLang, Zheng et al., NeurIPS'24, section 3): longest cached prefix first.

    As in SGLang's schedule_policy.py: ties by arrival, first come first served above `fcfs_above` waiting requests, and of requests that share
    a prefix which is not cached yet all but the first are put last (in-batch prefix caching).
    """

    may_starve = "requests with longer cached prefixes may keep coming"
    fcfs_above: int = FCFS_ABOVE

    def order(self, view: View) -> Iterable[Request]:
        if view.num_waiting > self.fcfs_above:
            return view.waiting
        ranked = sorted(self.matches(view), key=lambda found: (found[0], 0 if found[0] else -found[1]))
        return [request for _, _, request in ranked]


@hookimpl
def headway_register(registry):
    registry.add("order", "lpm", LongestPrefix)
