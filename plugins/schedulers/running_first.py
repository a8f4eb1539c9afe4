"""Running requests first, then waiting ones."""

from __future__ import annotations

from dataclasses import dataclass

from headway import (
    Context,
    NeedBlocks,
    NoBudget,
    Registry,
    Request,
    RequestState,
    Scheduler,
    StepBuilder,
    View,
    hookimpl,
    param,
)


@dataclass
class RunningFirst(Scheduler):
    """vLLM v1's scheduler (vllm/v1/core/sched/scheduler.py): running requests in order of admission, then
    waiting ones, as the budget lasts.

    token_budget: tokens per step (max_num_batched_tokens); None is the engine's.
    chunk_size: most tokens of one prompt in a step (long_prefill_token_threshold); None is what the budget
    leaves.

    No phases: each request gets what it lacks, a decode one token, so a long prompt that was admitted earlier
    leaves less for decodes behind it. A waiting request starts when the blocks of its first chunk are there,
    and nobody starts in a step that preempts. vLLM's victim is `victim=last_admitted`. Not here: speculative
    tokens, encoder budgets, KV connectors; preempted requests wait in the order's place and not at the head.
    """

    token_budget: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")
    chunk_size: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._running: dict[int, Request] = {}  # by index, in order of admission

    def plan(self, step: StepBuilder, view: View) -> None:
        step.limit(tokens=self.token_budget)
        running = list(self._running.values())
        for request in running:
            if request.state is RequestState.RUNNING:
                step.add(request, self.chunk_size)
        if any(request.state is RequestState.PREEMPTED for request in running):
            return
        for request in self.order(view):
            if isinstance(step.add(request, self.chunk_size), NoBudget | NeedBlocks):
                break

    def on_admit(self, request: Request, now: float) -> None:
        self._running[request.index] = request

    def on_preempt(self, request: Request, now: float) -> None:
        self._running.pop(request.index, None)

    on_finish = on_preempt


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "running_first", RunningFirst)
