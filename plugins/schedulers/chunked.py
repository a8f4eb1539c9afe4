"""Stall-free batching."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import Context, NeedBlocks, NoBudget, Request, Scheduler, StepBuilder, View, hookimpl, param


@dataclass
class ChunkedPrefill(Scheduler):
    """Sarathi-Serve (OSDI'24, section 4): decodes first, then prompt chunks fill the token budget.

    token_budget: tokens per step, tau in the paper (512 there); None is what suits the device, at most engine.max_num_batched_tokens.
    chunk_size: most tokens of one prompt in a step; None is what the budget leaves.
    """

    token_budget: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")
    chunk_size: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self.token_budget is None:
            self.token_budget = ctx.token_budget

    def plan(self, step: StepBuilder, view: View) -> None:
        self.fill(step, view.running, self.order(view))

    def fill(self, step: StepBuilder, running: Iterable[Request], waiting: Iterable[Request]) -> None:
        step.limit(tokens=self.token_budget)
        prefills = []
        for request in running:
            if request.num_new_tokens > 1:
                prefills.append(request)
            else:
                step.add(request)
        for request in prefills:
            step.add(request, self.chunk_size)
        for request in waiting:
            if isinstance(step.add(request, self.chunk_size), NoBudget | NeedBlocks):
                break


@hookimpl
def headway_register(registry):
    registry.add("scheduler", "chunked", ChunkedPrefill)
