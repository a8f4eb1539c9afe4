"""Iteration-level scheduling with reserved memory."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, NeedBlocks, NoBudget, Registry, Request, Scheduler, StepBuilder, View, hookimpl


@dataclass
class Orca(Scheduler):
    """Orca (Yu et al., OSDI'22, Algorithm 1): prompts and decodes share a step, and who starts has its
    longest possible KV reserved.

    Every iteration takes all running requests, then waiting ones, until engine.max_num_seqs (the paper's
    max_bs) or the first whose reservation does not fit; nobody behind that one starts. The reservation is
    prompt and max_tokens (the model's context, where there is none) in whole blocks, so nobody is ever
    preempted with cache=none, as in the paper. Twins of a running request's blocks, which a prefix cache may
    hold for it, come on top. Differs: the paper has no token budget; here a step holds at most
    engine.max_num_batched_tokens: a prompt that exceeds what is left waits, but for the first of a step,
    which is split.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._size, self._total, self._max_model_len = ctx.block_size, ctx.num_blocks, ctx.max_model_len
        self._reserved: dict[int, int] = {}  # running request index -> blocks
        self._sum = 0

    def plan(self, step: StepBuilder, view: View) -> None:
        prefills = 0
        step.add_decodes(view.running)
        for request in view.prefilling:
            prefills += bool(step.add(request))
        for request in self.order(view):
            if not step.admits(request):
                continue
            if self._reserved and self._sum + self.reservation(request) > self._total:
                break
            if prefills and request.num_tokens - view.match(request).num_tokens > step.tokens_left:
                break
            granted = step.add(request)
            if isinstance(granted, NoBudget | NeedBlocks):
                break
            prefills += bool(granted)

    def reservation(self, request: Request) -> int:
        """Blocks that it can come to hold; the last token is sampled, and never stored."""
        answer = request.sampling.max_tokens
        longest = self._max_model_len
        if answer is not None:
            longest = min(longest, request.num_prompt_tokens + answer)
        return min(self._total, -(-(longest - 1) // self._size))

    def on_admit(self, request: Request, now: float) -> None:
        self._reserved[request.index] = blocks = self.reservation(request)
        self._sum += blocks

    def on_preempt(self, request: Request, now: float) -> None:
        self._sum -= self._reserved.pop(request.index, 0)

    on_finish = on_preempt


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "orca", Orca)
