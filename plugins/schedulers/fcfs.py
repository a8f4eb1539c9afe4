"""Prefill-first, run to completion."""

from __future__ import annotations

from dataclasses import dataclass

from headway import NeedBlocks, NoBudget, Scheduler, StepBuilder, View, hookimpl


@dataclass
class PrefillFirst(Scheduler):
    """Orca (OSDI'22, section 4.2) and vLLM v0: whole prompts as soon as they fit, otherwise one token for everybody.

    A step is all prompts or all decodes. Prompts are never split, unless one alone exceeds the step's token budget.
    """

    def plan(self, step: StepBuilder, view: View) -> None:
        for request in view.prefilling:
            step.add(request)  # the rest of a prompt longer than the budget
        for request in self.order(view):
            if not step.admits(request):
                continue
            rest = request.num_tokens - view.match(request).num_tokens
            if step.num_seqs and rest > step.tokens_left:
                break
            if not step.fits(request) or isinstance(step.add(request), NoBudget | NeedBlocks):
                break
        if not step.num_seqs:
            for request in view.running:
                step.add(request)


@hookimpl
def headway_register(registry):
    registry.add("scheduler", "fcfs", PrefillFirst)
