"""Prompts in steps of their own, in chunks."""

from __future__ import annotations

from dataclasses import dataclass

from headway import NeedBlocks, NoBudget, Registry, Scheduler, StepBuilder, View, hookimpl, param


@dataclass
class PrefillAlone(Scheduler):
    """SGLang's default (Zheng et al., NeurIPS'24; managers/scheduler.py): prompts before decodes, never in
    one step, filled up to a chunk.

    chunk_size: prompt tokens per step (chunked_prefill_size); None is the engine's max_num_batched_tokens.
    The last prompt of a step is split to fill it, and goes on before others start.

    Decodes wait while there are prompts to compute. They are planned from most to fewest generated tokens, so
    that with victim=fewest_outputs memory runs out on whom SGLang retracts. Not here: its mixed chunks (off
    by default) and overlap.
    """

    chunk_size: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")

    def plan(self, step: StepBuilder, view: View) -> None:
        if view.prefilling or view.num_waiting:
            self.prefill(step, view)
        if not step.num_seqs:
            for request in sorted(view.running, key=lambda r: (-r.num_output_tokens, r.num_prompt_tokens)):
                step.add(request)

    def prefill(self, step: StepBuilder, view: View) -> None:
        left = self.chunk_size or step.tokens_left
        for request in view.prefilling:
            if left > 0 and (granted := step.add(request, left)):
                left -= granted.n
        for request in self.order(view):
            if left <= 0 or isinstance(granted := step.add(request, left), NoBudget | NeedBlocks):
                break
            if granted:
                left -= granted.n


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "sglang", PrefillAlone)
