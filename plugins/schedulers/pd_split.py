"""Two phases that alternate, each with its own limits."""

from __future__ import annotations

from dataclasses import dataclass

from headway import ConfigError, Context, Scheduler, StepBuilder, View, hookimpl


@dataclass
class TwoPhase(Scheduler):
    """Prefill and decode phases with batch limits of their own (nano-vLLM's two-phase loop).

    switch_waiting: a prefill phase begins when so many requests wait (1: as soon as one does) or nothing decodes.
    prefill_seqs, prefill_tokens, decode_seqs: limits of one step of that phase; None is the engine's.
    """

    switch_waiting: int = 1
    prefill_seqs: int | None = None
    prefill_tokens: int | None = None
    decode_seqs: int | None = None

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self.switch_waiting < 1:
            raise ConfigError(f"scheduler.switch_waiting={self.switch_waiting}: expected at least 1")

    def plan(self, step: StepBuilder, view: View) -> None:
        unfinished = [r for r in view.running if r.num_new_tokens > 1]
        decodes = len(view.running) - len(unfinished)
        if unfinished or view.num_waiting >= self.switch_waiting or not decodes:
            self.prefill(step, view, unfinished)
        if not step.num_seqs:
            step.limit(seqs=self.decode_seqs)
            for request in view.running:
                step.add(request)

    def prefill(self, step: StepBuilder, view: View, unfinished: list) -> None:
        tokens = min(step.tokens_left, self.prefill_tokens or step.tokens_left)
        seqs = self.prefill_seqs or step.seqs_left
        for request in unfinished:
            if tokens > 0 and seqs > 0 and (granted := step.add(request, tokens)):
                tokens, seqs = tokens - granted.n, seqs - 1
        for request in self.order(view):
            if tokens <= 0 or seqs <= 0 or not step.fits(request) or not (granted := step.add(request, tokens)):
                break
            tokens, seqs = tokens - granted.n, seqs - 1


@hookimpl
def headway_register(registry):
    registry.add("scheduler", "pd_split", TwoPhase)
