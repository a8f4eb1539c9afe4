"""Longest prefix match, with the oldest request every k-th time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from headway import Context, Order, Registry, Request, View, hookimpl, param


@dataclass
class KLongestPrefix(Order):
    """k-LPM (Dexter et al., NeurIPS'25, arXiv 2502.04677): the oldest request, then k - 1 with the longest
    cached prefix, and so on.

    k: 1 is first come first served, and very large is longest prefix match. Every request starts after at
    most k times as many others as were before it. window: oldest waiting requests that are looked at in a
    step.

    Differs: the paper's server takes one query at a time, and the next match is with the one before it; here
    matches are with all that is cached when the step begins. Ties go to the older one.
    """

    k: int = param(4, min=1, max=2**31 - 1, unit="requests")
    window: int = param(256, min=1, max=1_000_000, unit="requests")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._started = 0

    def order(self, view: View) -> Iterator[Request]:
        oldest = list(islice(view.waiting, self.window))
        longest = sorted(oldest, key=lambda request: -view.match(request).num_tokens)
        offered: set[int] = set()
        ways = iter(oldest), iter(longest)
        for _ in range(len(oldest)):
            way = ways[bool(self._started % self.k)]
            request = next(request for request in way if request.index not in offered)
            offered.add(request.index)
            yield request

    def on_admit(self, request: Request, now: float) -> None:
        self._started += 1


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "k_lpm", KLongestPrefix)
