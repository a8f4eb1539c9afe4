"""Prefill-first, run to completion."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, NeedBlocks, NoBudget, Registry, Scheduler, StepBuilder, View, hookimpl, param


@dataclass
class PrefillFirst(Scheduler):
    """vLLM v0's default (SOSP'23; its prefill-prioritising scheduler): whole prompts as soon as they fit,
    otherwise one token for everybody.

    watermark: share of the pool that a prompt must leave free when it starts beside others. vLLM v0 has 0.01,
    which `policy=vllm_v0` sets; 0, the default, is without it.
    max_wait_tokens: steps of decodes after which requests may start again (S-LoRA and LightLLM, by this name;
    10 in VTC's artifact); 0, the default: at any step.

    A step is all prompts or all decodes. Prompts are never split, unless one alone exceeds the step's token
    budget. Not here: swapping to the host, which vLLM v0 keeps for requests of several sequences.
    `scheduler=fcfs` is the same.
    """

    watermark: float = param(0.0, min=0, below=1)
    max_wait_tokens: int = param(0, min=0, max=2**31 - 1, unit="steps")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._waited = 0  # steps of decodes since a prompt was planned

    def plan(self, step: StepBuilder, view: View) -> None:
        for request in view.prefilling:
            step.add(request)  # the rest of a prompt longer than the budget
        if not view.num_running or self._waited >= self.max_wait_tokens:
            self.add_prompts(step, view)
        if step.num_seqs:
            self._waited = 0
        else:
            self._waited += 1
            for request in view.running:
                step.add(request)

    def add_prompts(self, step: StepBuilder, view: View) -> None:
        for request in self.order(view):
            if not step.admits(request):
                continue
            rest = request.num_tokens - view.match(request).num_tokens
            if step.num_seqs and rest > step.tokens_left:
                break
            spare = int(self.watermark * view.kv.total) if view.num_running else 0
            if not step.fits(request, spare) or isinstance(step.add(request), NoBudget | NeedBlocks):
                break


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "prefill_first", PrefillFirst)
    registry.add("scheduler", "fcfs", PrefillFirst)
