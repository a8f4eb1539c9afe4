"""Decodes that are ahead of their SLO make room for prompts."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
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
class FairBatching(Scheduler):
    """FairBatching (Lyu et al. 2025, arXiv 2510.14392): urgent decodes, then prompts, then the other decodes,
    for as long as the decodes' SLOs let a step take.

    token_budget: tokens per step; None is what suits the device.
    floor: tokens that a step may hold even if somebody is late by them, or late already.
    time_between_tokens: of requests without `slo.tpot`.

    The j-th token of an answer, counted from 0, is due at arrival + slo.ttft + j * slo.tpot, so who was fast
    has saved up slack; without a target for the first token, the answer is due from when that came. A step
    may take as long as the least slack of all running decodes, and never less than their smallest slo.tpot.
    A decode is urgent if its slack does not last for that time and a smallest slo.tpot more. Decodes go by
    slack, started prompts by arrival, waiting ones as the order says (policy=fairbatching takes order=edf,
    which is slack for prompts); a prompt starts when the blocks of all of it are there.

    Differs, as it is built from the abstract and from what others published about a text that was not at hand
    in full: the paper predicts a step by a line in new tokens and context that is fitted to its device, here
    the executor's cost model is asked; the floor, the order of started prompts and the targets that stand in
    for missing ones are not the paper's. Not here: its estimate of how much prefill an instance can still
    take, which is for routers.
    """

    token_budget: int | None = param(None, min=1, max=2**31 - 1, unit="tokens")
    floor: int = param(128, min=1, max=2**31 - 1, unit="tokens")
    time_between_tokens: float = param(0.2, above=0, max=1e9, unit="seconds")
    requires = ("step_time", "slo")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self.token_budget is None:
            self.token_budget = ctx.token_budget
        self._seconds = math.inf  # that the step being planned may take

    def plan(self, step: StepBuilder, view: View) -> None:
        step.limit(tokens=self.token_budget)
        decodes = [
            (self.due(request, view), request.sort_key, request)
            for request in view.running
            if request.num_new_tokens == 1
        ]
        decodes.sort()
        urgent = 0
        self._seconds = math.inf
        if decodes:
            shortest = min(self.tpot(request) for *_, request in decodes)
            # Steps in flight have their share of the slack.
            self._seconds = max((decodes[0][0] - view.now) / (1 + view.lag), shortest)
            urgent = bisect_left(decodes, (view.now + self._seconds + shortest,))
        by_slack = [request for *_, request in decodes]
        self.add_decodes(step, view, by_slack[:urgent])
        self.add_prompts(step, view)
        self.add_decodes(step, view, by_slack[urgent:])

    def tpot(self, request: Request) -> float:
        return self.time_between_tokens if request.slo.tpot is None else request.slo.tpot

    def due(self, request: Request, view: View) -> float:
        """When its next token is, in seconds on the run's clock."""
        if request.slo.ttft is not None:
            first = request.arrival_time + request.slo.ttft
        else:
            first = request.token_times[0] if request.token_times else view.now
        return first + (request.num_tokens - request.num_prompt_tokens) * self.tpot(request)

    def add_decodes(self, step: StepBuilder, view: View, decodes: list[Request]) -> None:
        starts, lengths = view.planned
        places = [request.num_computed_tokens + request.num_scheduled_tokens for request in decodes]

        def fits(n: int) -> bool:
            return view.step_time([*starts, *places[:n]], [*lengths, *[1] * n]) <= self._seconds

        step.add_decodes(decodes[: self.most(min(len(decodes), step.tokens_left), step, fits)])

    def add_prompts(self, step: StepBuilder, view: View) -> None:
        promised = 0  # blocks that started prompts still lack
        for request in view.running:
            if request.num_new_tokens > 1:
                if (chunk := self.chunk(step, view, request)) > 0:
                    step.add(request, chunk)
                promised += view.num_blocks_for(request.num_tokens) - len(request.block_table)
        for request in self.order(view):
            if not step.admits(request):
                continue
            if not step.fits(request, promised) or (chunk := self.chunk(step, view, request)) == 0:
                break
            if isinstance(step.add(request, chunk), NoBudget | NeedBlocks):
                break
            promised += view.num_blocks_for(request.num_tokens) - len(request.block_table)

    def chunk(self, step: StepBuilder, view: View, request: Request) -> int:
        """Tokens of a prompt for which there is time."""
        start = request.num_computed_tokens + request.num_scheduled_tokens or view.match(request).num_tokens
        starts, lengths = view.planned

        def fits(n: int) -> bool:
            return view.step_time([*starts, start], [*lengths, n]) <= self._seconds

        return self.most(min(request.num_tokens - start, step.tokens_left), step, fits)

    def most(self, wanted: int, step: StepBuilder, fits: Callable[[int], bool]) -> int:
        """The most tokens up to `wanted` that fit, and those of the floor in any case."""
        low, high = min(wanted, max(0, self.floor - step.num_tokens)), wanted  # low is granted, high is not
        if low == wanted or self._seconds == math.inf or fits(wanted):
            return wanted
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "fairbatching", FairBatching)
