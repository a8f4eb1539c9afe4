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
    RequestState,
    StepBuilder,
    View,
    hookimpl,
    param,
)

from .chunked import ChunkedPrefill


@dataclass
class Preemptive(ChunkedPrefill):
    """scheduler=chunked, but a waiting request takes the place of running ones that the order ranks behind it
    (SRPT, FastServe, LTR, EDF).

    mode: how they make way: "pause" keeps their KV until memory runs short, "recompute" gives it up at once,
    "drop_tail" all but its head.

    Before each step the best waiting requests are given, in the order's ranking, what is free of sequences
    and blocks; where that is short, the last-ranked running requests go, but only if that is enough for the
    request to start. Running requests are then planned in the same ranking. Which paused requests lose their
    blocks first is the victim role's: victim=pause_first goes by the order. Differs: where memory runs short
    FastServe and Autellix swap KV to the host; here it is recomputed, and who was preempted stays until it
    has generated a token: nobody recomputes for ever. Needs an order that ranks running requests too: a
    KeyOrder or a MovingOrder, not a queue discipline as fcfs, lpm, vtc or dlpm.
    """

    mode: str = param("pause", choices=("pause", *PREEMPTION_MODES))

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self._order.rank_at(0.0) is None:
            raise ConfigError(
                f"{self.plugin_name} needs an order that ranks running requests too, and "
                f"{self._order.plugin_name} does not: "
                "choose one that goes by a key (order=srpt, edf, ltr, plas, jitserve, ...), or derive yours "
                "from headway.KeyOrder or MovingOrder"
            )
        self._max_num_seqs = ctx.max_num_seqs
        self._leaving: list[Request] = []  # who made way, with blocks that come back with a step in flight
        # Index of a request that was preempted -> how often, tokens it had generated when it came back.
        self._paid: dict[int, tuple[int, int]] = {}

    def plan(self, step: StepBuilder, view: View) -> None:
        rank = self.ranking(view)
        running = sorted(view.running, key=rank)
        first = next(self.order(view), None)
        better = first is not None and running and rank(first) < rank(running[-1])
        gone = self.make_way(step, view, running, rank) if better else set()
        waiting = (request for request in self.order(view) if request.index not in gone)
        self.fill(step, view, [request for request in running if request.index not in gone], waiting)

    def ranking(self, view: View) -> Callable[[Request], Any]:
        """How running and waiting requests compare now: the smaller goes first."""
        rank = self._order.rank_at(view.now)
        assert rank is not None  # since `setup`
        return rank

    def make_way(
        self, step: StepBuilder, view: View, running: list[Request], rank: Callable[[Request], Any]
    ) -> set[int]:
        """Preempts from the end of `running` for as many waiting requests as rank before it and may start;
        returns the indices of those that went."""
        paid = self._paid
        movable = [r for r in running if r.num_output_tokens > paid.get(r.index, (0, -1))[1]]
        self._leaving = [
            r for r in self._leaving if r.num_scheduled_tokens and r.state is not RequestState.RUNNING
        ]
        seqs = self._max_num_seqs - len(running)
        blocks = (
            view.kv.available + view.kv.paused + sum(len(request.block_table) for request in self._leaving)
        )
        blocks -= sum(self.lacks(request, view) for request in running)
        budget = step.tokens_left if self.token_budget is None else min(step.tokens_left, self.token_budget)
        tokens = budget - sum(request.num_new_tokens for request in running)
        gone: set[int] = set()
        last = rank(running[-1])
        for request in self.order(view):
            if rank(request) >= last:
                break
            if request.num_steps_in_flight or not step.admits(request):
                continue
            need = view.num_blocks_for(request.num_tokens)
            if request.state is not RequestState.PAUSED:  # what a paused one holds is among `blocks`
                need -= len(request.block_table)
            others: list[Request] = []
            while (seqs < 1 or blocks < need) and movable and rank(request) < rank(movable[-1]):
                other = movable.pop()
                others.append(other)
                seqs, tokens = seqs + 1, tokens + other.num_new_tokens
                blocks += len(other.block_table) + self.lacks(other, view)
            if seqs < 1 or blocks < need or tokens <= 0:
                break
            for other in others:
                gone.add(other.index)
                self._leaving.append(other)
                self.displace(step, other)
            seqs, blocks, tokens = seqs - 1, blocks - need, tokens - request.num_new_tokens
        return gone

    def displace(self, step: StepBuilder, request: Request) -> None:
        if self.mode == "pause":
            step.pause(request)
        else:
            step.preempt(request, self.mode)

    def on_admit(self, request: Request, now: float) -> None:
        before, _ = self._paid.get(request.index, (0, -1))
        if request.num_preemptions > before:
            self._paid[request.index] = (request.num_preemptions, request.num_output_tokens)

    def on_finish(self, request: Request, now: float) -> None:
        self._paid.pop(request.index, None)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("scheduler", "preemptive", Preemptive)
