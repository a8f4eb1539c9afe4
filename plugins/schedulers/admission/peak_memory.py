"""Admission by the largest possible peak of memory."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, Registry, Request, hookimpl

from .peak import PeakAdmission


@dataclass
class PeakMemory(PeakAdmission):
    """S-LoRA's and VTC's admission (Sheng et al., MLSys'24 and OSDI'24; from LightLLM): the peak of KV memory
    must fit if all use up max_tokens.

    reserved: share of the pool that is kept free.

    Where prompts are computed in one step nobody is ever preempted: with scheduler=prefill_first and prompts
    within engine.max_num_batched_tokens. A request without max_tokens is taken to fill the context.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._max_model_len = ctx.max_model_len

    def left(self, request: Request) -> int:
        cap, most = request.sampling.max_tokens, self._max_model_len - request.num_prompt_tokens
        return max(1, (most if cap is None else min(most, cap)) - request.num_output_tokens)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("admission", "peak_memory", PeakMemory)
