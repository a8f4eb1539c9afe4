"""Stall-free batching in which a better prompt overtakes one that is half done."""

from __future__ import annotations

from dataclasses import dataclass

from headway import (
    ConfigError,
    Context,
    KeyOrder,
    NeedBlocks,
    NoBudget,
    Registry,
    Request,
    StepBuilder,
    View,
    hookimpl,
)

from .chunked import ChunkedPrefill


@dataclass
class Selective(ChunkedPrefill):
    """scheduler=chunked with the selective preemption of Niyama (Goel et al., arXiv 2503.22562, section 3):
    prompts are taken as they rank.

    Decodes come first and are never passed over. Prompts that have begun and requests that wait compete in
    the order's ranking for what the budget leaves, so a better one overtakes a prompt that is half done,
    which keeps its blocks and goes on later: nothing is recomputed. Needs an order with a key.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if not isinstance(self._order, KeyOrder):
            raise ConfigError(
                f"{self.plugin_name} needs an order that ranks running requests too, and "
                f"{self._order.plugin_name} does not: "
                "choose order=niyama, edf, priority, srpt or another KeyOrder"
            )
        self._rank = self._order.rank

    def plan(self, step: StepBuilder, view: View) -> None:
        step.limit(tokens=self.token_budget)
        rank = self._rank
        prefills = step.add_decodes(view.running)
        begun = sorted(prefills, key=rank, reverse=True)  # the best is the last
        waiting = self.order(view)
        candidate = next(waiting, None)
        while begun or candidate is not None:
            if candidate is None or (begun and rank(begun[-1]) < rank(candidate)):
                if isinstance(step.add(begun.pop(), self.chunk_size), NoBudget):
                    break
            elif not step.admits(candidate):
                candidate = next(waiting, None)
            elif not self.has_room(step, view, candidate, prefills):
                candidate = None  # nor does anybody behind it start
            else:
                granted = step.add(candidate, self.chunk_size)
                prefills.append(candidate)
                # as many run as may; what has begun goes on
                ends = isinstance(granted, NoBudget | NeedBlocks)
                candidate = None if ends else next(waiting, None)

    def has_room(self, step: StepBuilder, view: View, candidate: Request, prefills: list[Request]) -> bool:
        """Whether it finds its blocks beside those that prompts which have begun still need."""
        if self.admit_on == "chunk":
            return True
        return step.fits(candidate, sum(self.lacks(request, view) for request in prefills))


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "selective", Selective)
