"""Decodes wait until they are due."""

from __future__ import annotations

from dataclasses import dataclass

from headway import (
    Context,
    Granted,
    NeedBlocks,
    NoBudget,
    Registry,
    Request,
    RequestState,
    Scheduler,
    StepBuilder,
    StepRecord,
    View,
    hookimpl,
    param,
)


@dataclass
class LastSchedulable(Scheduler):
    """SLAI (Bari, Hegde, de Veciana 2025, arXiv 2508.01002, eq. 8, and the authors' code): decodes that are
    due, then prompts, then the other decodes, as the budget lasts.

    A decode is due a time between tokens after its last one, less `offset` steps of mean length, so that it
    comes in time though the next steps hold prompts. That time is the request's `slo.tpot`.

    token_budget: tokens per step; None is what suits the device.
    time_between_tokens: of requests without `slo.tpot`.
    offset, offset_when_full, memory_limit: steps by which a decode is due early, and when that share of the
    blocks is in use; the authors' "dynamic offset". Equal offsets are their fixed one.
    most_decodes: in one step.

    Due decodes go by their times, started prompts by arrival, waiting ones as the order says (the paper's is
    order=spf); a prompt starts when the blocks of all of it are there. Differs: the authors' victims are
    started prompts, last arrived first, and then the decode itself; here the victim role names them.
    """

    token_budget: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")
    time_between_tokens: float = param(0.2, above=0, max=1e9, unit="seconds")
    offset: float = param(5.0, min=0, max=1e6, unit="steps")
    offset_when_full: float = param(10.0, min=0, max=1e6, unit="steps")
    memory_limit: float = param(0.96, min=0, max=1)
    most_decodes: int = param(128, min=1, max=2**31 - 1)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._num_blocks = ctx.num_blocks
        if self.token_budget is None:
            self.token_budget = ctx.token_budget
        self._due: dict[int, float] = {}  # index of a request that decodes -> seconds on the run's clock
        self._num_steps, self._mean = 0, 0.0  # seconds of a step

    def plan(self, step: StepBuilder, view: View) -> None:
        step.limit(tokens=self.token_budget)
        due, now = self._due, view.now
        decodes = [request for request in view.running if request.num_new_tokens <= 1]
        decodes.sort(key=lambda request: (due.get(request.index, now), request.sort_key))
        late = [request for request in decodes if due.get(request.index, now) <= now]
        left = self.most_decodes - self.add_decodes(step, late, self.most_decodes)
        self.add_prompts(step, view)
        self.add_decodes(step, [request for request in decodes if request not in step], left)

    def add_decodes(self, step: StepBuilder, decodes: list[Request], most: int) -> int:
        """Returns how many were planned."""
        planned = 0
        for request in decodes:
            if planned == most:
                break
            planned += isinstance(step.add(request), Granted)
        return planned

    def add_prompts(self, step: StepBuilder, view: View) -> None:
        promised = 0  # blocks that started prompts still lack
        for request in view.running:
            if request.num_new_tokens > 1:
                step.add(request)
                promised += view.num_blocks_for(request.num_tokens) - len(request.block_table)
        for request in self.order(view):
            if not step.admits(request):
                continue
            if not step.fits(request, promised) or isinstance(step.add(request), NoBudget | NeedBlocks):
                break
            promised += view.num_blocks_for(request.num_tokens) - len(request.block_table)

    def on_step_end(self, record: StepRecord) -> None:
        self._num_steps += 1
        self._mean += (record.end - record.start - self._mean) / self._num_steps
        full = record.kv_used >= self.memory_limit * self._num_blocks
        early = (self.offset_when_full if full else self.offset) * self._mean
        for request in record.plan.requests:
            if request.state is RequestState.RUNNING and request.num_new_tokens <= 1:
                between = self.time_between_tokens if request.slo.tpot is None else request.slo.tpot
                self._due[request.index] = record.end + between - early

    def on_preempt(self, request: Request, now: float) -> None:
        self._due.pop(request.index, None)

    on_finish = on_preempt


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "slai", LastSchedulable)
