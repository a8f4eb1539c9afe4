"""Stall-free batching in which the order also decides who runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headway import (
    PREEMPTION_MODES,
    ConfigError,
    Context,
    Registry,
    Request,
    StepBuilder,
    View,
    hookimpl,
    param,
)

from .chunked import ChunkedPrefill


@dataclass
class Preemptive(ChunkedPrefill):
    """scheduler=chunked, but a waiting request takes the place of running ones that the order ranks behind it (SRPT, FastServe, LTR, EDF).

    mode: how they are preempted: "recompute" or "drop_tail".

    Before each step the best waiting requests are given, in the order's ranking, what is free of sequences and blocks; where that is
    short, the last-ranked running requests go, but only if that is enough for the request to start. Running requests are then planned
    in the same ranking. Differs: papers that preempt swap KV to the host (FastServe, Autellix); here it is
    recomputed, so preemption costs more than theirs, and a request that was preempted before stays until it
    has generated a token: nobody recomputes for ever.
    Needs an order that ranks running requests too: a KeyOrder or a MovingOrder, not a queue discipline as
    fcfs, lpm, vtc or dlpm.
    """

    mode: str = param("recompute", choices=PREEMPTION_MODES)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self._order.rank_at(0.0) is None:
            raise ConfigError(
                f"{self.plugin_name} needs an order that ranks running requests too, and {self._order.plugin_name} does not: "
                "choose order=priority, sjf, srpt, edf, least_slack, ltr, mlfq or plas, or derive yours from headway.KeyOrder or MovingOrder"
            )
        self._max_num_seqs = ctx.max_num_seqs
        self._leaving: list[Request] = []  # preempted, with blocks that come back with a step in flight
        self._paid: dict[int, int] = {}  # preempted request index -> tokens it had generated then

    def plan(self, step: StepBuilder, view: View) -> None:
        rank = self._order.rank_at(view.now)
        assert rank is not None  # since `setup`
        running = sorted(view.running, key=rank)
        first = next(self.order(view), None)
        better = first is not None and running and rank(first) < rank(running[-1])
        gone = self.make_way(step, view, running, rank) if better else set()
        waiting = (request for request in self.order(view) if request.index not in gone)
        self.fill(step, view, [request for request in running if request.index not in gone], waiting)

    def make_way(self, step: StepBuilder, view: View, running: list[Request], rank: Callable[[Request], Any]) -> set[int]:
        """Preempts from the end of `running` for as many waiting requests as rank before it and may start; returns the indices of those
        that went."""
        paid = self._paid
        movable = [request for request in running if request.num_output_tokens > paid.get(request.index, -1)]
        self._leaving = [request for request in self._leaving if request.num_scheduled_tokens]
        seqs = self._max_num_seqs - len(running)
        blocks = view.kv.available + sum(len(request.block_table) for request in self._leaving)
        blocks -= sum(self.lacks(request, view) for request in running)
        budget = step.tokens_left if self.token_budget is None else min(step.tokens_left, self.token_budget)
        tokens = budget - sum(request.num_new_tokens for request in running)
        gone: set[int] = set()
        last = rank(running[-1])
        for request in self.order(view):
            if rank(request) >= last:
                break
            if not step.admits(request):
                continue
            need = view.num_blocks_for(request.num_tokens) - len(request.block_table)
            others: list[Request] = []
            while (seqs < 1 or blocks < need) and movable and rank(request) < rank(movable[-1]):
                other = movable.pop()
                others.append(other)
                seqs, tokens = seqs + 1, tokens + other.num_new_tokens
                blocks += len(other.block_table) + self.lacks(other, view)
            if seqs < 1 or blocks < need or tokens <= 0:
                break
            for other in others:
                paid[other.index] = other.num_output_tokens
                gone.add(other.index)
                self._leaving.append(other)
                step.preempt(other, self.mode)
            seqs, blocks, tokens = seqs - 1, blocks - need, tokens - request.num_tokens
        return gone

    def on_finish(self, request: Request, now: float) -> None:
        self._paid.pop(request.index, None)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "preemptive", Preemptive)
