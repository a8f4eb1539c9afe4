"""Who runs is chosen as a group of similar lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from headway import ConfigError, Context, Registry, Request, StepBuilder, View, hookimpl, param

from .preemptive import Preemptive


@dataclass
class GroupedMargin(Preemptive):
    """GMAX, the grouped margin goodput maximisation of JITServe (Zhang et al., NSDI'26, arXiv 2504.20068, and
    the authors' code): of the best requests, those of similar lengths whose priorities add up to the most.

    interval: steps from one choice to the next; 50 is the authors' default.
    candidates: best requests among which it chooses, as a multiple of those that may run at once; 4 is ours.

    Of the best, sorted by their tokens so far, it takes as many neighbours as may run at once. These go
    before all others until the next choice, and only at a choice does anybody make way, as with
    scheduler=preemptive. Needs an order whose key begins with a number that can be added up, smallest first:
    order=jitserve. Differs: the authors swap at most a few requests to the host in a step, and let
    whoever is as long as the group stay with it; here those that are not chosen wait with their KV.
    """

    interval: int = param(50, min=1, max=2**31 - 1, unit="steps")
    candidates: int = param(4, min=1, max=1024)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._group: frozenset[int] = frozenset()  # indices of requests
        self._chosen_at = -self.interval  # the step

    def plan(self, step: StepBuilder, view: View) -> None:
        if view.step - self._chosen_at >= self.interval:
            self._chosen_at = view.step
            self._group = self.choose(view)
            super().plan(step, view)
        else:
            group = self._group
            running = sorted(view.running, key=lambda request: request.index not in group)
            self.fill(step, view, running, self.order(view))

    def choose(self, view: View) -> frozenset[int]:
        rank, most = super().ranking(view), self._max_num_seqs
        best = sorted([*view.running, *super().order(view)], key=rank)[: most * self.candidates]
        best.sort(key=lambda request: (request.num_tokens, request.sort_key))
        worth = [self.worth(rank(request)) for request in best]
        starts = range(max(1, len(best) - most + 1))
        begin = min(starts, key=lambda start: sum(worth[start : start + most]))
        return frozenset(request.index for request in best[begin : begin + most])

    def worth(self, rank: Any) -> float:
        key = rank[0]
        number = key[0] if isinstance(key, tuple) else key
        if not isinstance(number, int | float):
            raise ConfigError(
                f"{self.plugin_name} adds up what the order ranks by, and {self._order.plugin_name} ranks by "
                f"{key!r}: choose order=jitserve, or another whose key begins with a number"
            )
        return float(number)

    def ranking(self, view: View) -> Callable[[Request], Any]:
        rank, group = super().ranking(view), self._group
        return lambda request: (request.index not in group, rank(request))

    def order(self, view: View) -> Iterator[Request]:
        """The group first, and both parts as the order says."""
        waiting = list(super().order(view))
        yield from sorted(waiting, key=lambda request: request.index not in self._group)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "jitserve", GroupedMargin)
