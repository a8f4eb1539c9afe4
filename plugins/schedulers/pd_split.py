"""Two phases that alternate, each with its own limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headway import NeedBlocks, NoBudget, Registry, Request, Scheduler, StepBuilder, View, hookimpl, param


@dataclass
class TwoPhase(Scheduler):
    """Prefill and decode phases with batch limits of their own (nano-vLLM's two-phase loop,
    nanovllm/engine/scheduler.py).

    switch_waiting: a prefill phase begins when so many requests wait (1: as soon as one does) or nothing
    decodes. prefill_seqs, prefill_tokens, decode_seqs: limits of one step of that phase; None is the
    engine's.

    As there, only the first prompt of a step may be split; one behind it that exceeds what is left of the
    tokens waits for the next step. nano-vLLM has switch_waiting=1 and no limits of its own for a phase.
    """

    switch_waiting: int = param(1, min=1, max=2**31 - 1, unit="requests")
    prefill_seqs: int | None = param(None, min=1, max=2**31 - 1, unit="requests")
    prefill_tokens: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")
    decode_seqs: int | None = param(None, min=1, max=2**31 - 1, unit="requests")

    def plan(self, step: StepBuilder, view: View) -> None:
        unfinished = [r for r in view.running if r.num_new_tokens > 1]
        decodes = len(view.running) - len(unfinished)
        if unfinished or view.num_waiting >= self.switch_waiting or not decodes:
            self.prefill(step, view, unfinished)
        if not step.num_seqs:
            step.limit(seqs=self.decode_seqs)
            for request in view.running:
                step.add(request)

    def prefill(self, step: StepBuilder, view: View, unfinished: Sequence[Request]) -> None:
        tokens = min(step.tokens_left, self.prefill_tokens or step.tokens_left)
        seqs = self.prefill_seqs or step.seqs_left
        for request in unfinished:
            if tokens > 0 and seqs > 0 and (granted := step.add(request, tokens)):
                tokens, seqs = tokens - granted.n, seqs - 1
        for request in self.order(view):
            if tokens <= 0 or seqs <= 0:
                break
            if not step.admits(request):
                continue
            if step.num_seqs and request.num_tokens - view.match(request).num_tokens > tokens:
                break
            if not step.fits(request) or isinstance(
                granted := step.add(request, tokens), NoBudget | NeedBlocks
            ):
                break
            if granted:
                tokens, seqs = tokens - granted.n, seqs - 1


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "pd_split", TwoPhase)
