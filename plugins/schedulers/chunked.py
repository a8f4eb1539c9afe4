"""Stall-free batching."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import (
    Context,
    NeedBlocks,
    NoBudget,
    Registry,
    Request,
    Scheduler,
    StepBuilder,
    View,
    hookimpl,
    param,
)


@dataclass
class ChunkedPrefill(Scheduler):
    """Sarathi-Serve (Agrawal et al., OSDI'24, Algorithm 3): decodes first, then prompt chunks fill the token
    budget.

    token_budget: tokens per step, tau in the paper (512 there); None is what suits the device, at most
    engine.max_num_batched_tokens. Prompts get tau less the decodes.
    chunk_size: most tokens of one prompt in a step; None is what the budget leaves.
    admit_on: a waiting request starts when the blocks of its whole "prompt" are there, as in the paper, or
    those of its first "chunk", as in vLLM v1; what starts on a chunk may be preempted before its prompt is
    done, and computes it again.

    Blocks are allocated chunk by chunk; those that a started prompt still lacks are kept from others that
    want to start.
    Differs: the authors' code leaves 1% of the pool free when a request starts; here nothing is set aside.
    """

    token_budget: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")
    chunk_size: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")
    admit_on: str = param("prompt", choices=("prompt", "chunk"))

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self.token_budget is None:
            self.token_budget = ctx.token_budget

    def plan(self, step: StepBuilder, view: View) -> None:
        self.fill(step, view, view.running, self.order(view))

    def fill(
        self, step: StepBuilder, view: View, running: Iterable[Request], waiting: Iterable[Request]
    ) -> None:
        step.limit(tokens=self.token_budget)
        prefills = step.add_decodes(running)
        for request in prefills:
            step.add(request, self.chunk_size)
        promised = sum(self.lacks(request, view) for request in prefills)
        for request in waiting:
            if self.admit_on == "prompt":
                if not step.admits(request):
                    continue
                if not step.fits(request, promised):
                    break
            granted = step.add(request, self.chunk_size)
            if isinstance(granted, NoBudget | NeedBlocks):
                break
            promised += self.lacks(request, view)

    def lacks(self, request: Request, view: View) -> int:
        """Blocks that a running request's prompt, or what it recomputes, needs beside those that it has."""
        if self.admit_on == "chunk" or not request.block_table or request.num_new_tokens <= 1:
            return 0
        return max(0, view.num_blocks_for(request.num_tokens) - len(request.block_table))


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "chunked", ChunkedPrefill)
