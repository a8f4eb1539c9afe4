"""Engine.abort: a request ends at the next turn, wherever it is, and leaves nothing behind."""

from __future__ import annotations

from random import Random
from threading import Thread

import pytest
from helpers.policy_runs import REGISTRY, compose
from helpers.recorded_decisions import arrivals
from helpers.scripted import ask, engine, everybody

from core.compose.config import EngineConfig
from core.outputs import RunResult
from core.outside import Observer
from core.policy import Order
from core.request import RequestState
from plugins.cache.hash import HashBlocks
from plugins.schedulers.chunked import ChunkedPrefill


class Aborts(Observer):
    """Calls `abort(engine, record)` after each step."""

    def __init__(self, abort) -> None:
        self.abort = abort

    def on_start(self, running):
        self.running = running

    def on_step(self, record):
        self.abort(self.running, record)


class Ends(Order):
    """Keeps the state in which each request ended, as the roles are told."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, RequestState]] = []

    def order(self, view):
        return view.waiting

    def on_finish(self, request, now):
        self.ended.append((request.id, request.state))


def clean(running) -> bool:
    roster = running.roster
    lists = (roster.running.items, roster.waiting.items, roster.present, roster.hidden_ends)
    blocks = (roster.releasing, roster.kept_heads, roster.reserved_blocks)
    return not any((*lists, *blocks)) and running.pool.num_used == 0


def ids(result: RunResult, state: str) -> list[str]:
    return [output.id for output in result.outputs if output.state == state]


def abort_at(step: int, id: str):
    return lambda running, record: running.abort(id) if record.step == step else None


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_running_request_ends_with_the_tokens_that_it_has(depth: int) -> None:
    """With steps in flight its blocks come back later, and what those steps sample for it is dropped."""
    order, left = Ends(), []

    def abort(running, record):
        left.extend(request.id for request in record.plan.left)
        if record.step == 3:
            running.abort("a")

    running = engine(roles={"order": order}, observers=[Aborts(abort)], max_inflight=depth)
    result = running.run([ask(6, 20, id="a"), ask([1, 2, 3, 4, 0], 9, id="b")])
    a, b = result.outputs
    assert (a.state, a.finish_reason, len(a.output_token_ids)) == ("aborted", "abort", 4)
    assert (b.state, len(b.output_token_ids)) == ("finished", 9)
    assert order.ended == [("a", RequestState.ABORTED), ("b", RequestState.FINISHED)]
    assert left == ["a"], "the executor hears that its row is free"
    assert clean(running) and result.status == "finished"


def test_a_waiting_request_never_starts() -> None:
    running = engine(observers=[Aborts(abort_at(0, "b"))], max_num_seqs=1)
    result = running.run([ask(6, 4, id="a"), ask(6, 4, id="b"), ask(6, 4, id="c")])
    assert ids(result, "finished") == ["a", "c"]
    assert result.outputs[1].first_scheduled_time == -1.0 and clean(running)


@pytest.mark.parametrize(("depth", "when"), [(1, 3), (3, 1)])
def test_a_preempted_request_gives_up_the_head_that_it_kept(depth: int, when: int) -> None:
    """With three plans in flight it is aborted while a step that uses its blocks is still out."""

    def script(step, view):
        for request in view.running:
            if view.step == 3 and request.id == "a":
                step.preempt(request, "drop_tail")
            else:
                step.add(request)
        if view.step < 3:
            for request in view.waiting:
                step.add(request)

    held = []

    def abort(running, record):
        if record.step == when:
            (request,) = running.waiting
            keeps = bool(running.roster.kept_heads)
            held.append((keeps, request.num_steps_in_flight, len(request.block_table)))
            running.abort("a")

    running = engine(script, observers=[Aborts(abort)], max_inflight=depth)
    result = running.run([ask(13, 20, id="a"), ask([1, 2, 3, 4, 0], 9, id="b")])
    assert held == [(False, 0, 3) if depth == 1 else (True, 1, 4)]
    assert ids(result, "aborted") == ["a"] and ids(result, "finished") == ["b"] and clean(running)


def test_a_request_ends_when_it_arrives_if_it_was_aborted_before() -> None:
    running = engine()
    running.add(ask(6, 4, id="a", time=1.0))
    running.abort("a")
    result = running.run([ask(6, 4, id="b")])
    assert ids(result, "aborted") == ["a"] and ids(result, "finished") == ["b"] and clean(running)
    assert running.run([ask(6, 4, id="a")]).outputs[0].state == "finished", "an abort is for one run"


def test_who_has_ended_or_never_was_is_left_alone() -> None:
    def abort(running, record):
        if record.step > 4:
            running.abort("a")
            running.abort("nobody")

    running = engine(observers=[Aborts(abort)])
    result = running.run([ask(6, 2, id="a"), ask(6, 9, id="b")])
    assert ids(result, "finished") == ["a", "b"]


def test_another_thread_may_abort() -> None:
    def abort(running, record):
        if record.step == 2:
            (thread := Thread(target=running.abort, args=("a",))).start()
            thread.join()

    running = engine(observers=[Aborts(abort)], max_inflight=2)
    assert ids(running.run([ask(6, 20, id="a")]), "aborted") == ["a"] and clean(running)


def test_nothing_follows_an_aborted_request_in_a_closed_loop() -> None:
    follow = lambda request, now: [ask(4, 1, time=now, id=request.id + "+")] if len(request.id) < 2 else []  # noqa: E731
    running = engine(observers=[Aborts(abort_at(1, "a"))])
    result = running.run([ask(6, 9, id="a"), ask(6, 4, id="b")], follow)
    assert [output.id for output in result.outputs] == ["a", "b", "b+"]


@pytest.mark.parametrize("seed", range(24))
def test_aborts_at_random_leave_other_answers_as_they_are(seed: int) -> None:
    """Few blocks, so that there are preemptions and evictions; the ledger and the KV oracle check every
    step."""
    rng = Random(seed)
    prompts = [[rng.randrange(5) for _ in range(rng.randrange(1, 12))] for _ in range(12)]
    arrivals = [ask(p, rng.randrange(1, 9), time=0.01 * i, id=f"x{i}") for i, p in enumerate(prompts)]

    def answers(observers):
        roles = {"scheduler": ChunkedPrefill(token_budget=None), "cache": HashBlocks()}
        running = engine(everybody, roles=roles, observers=observers, num_blocks=9, max_inflight=1 + seed % 3)
        result = running.run(arrivals)
        assert clean(running) and len(result.outputs) == len(arrivals)
        return {o.id: o for o in result.outputs}

    def abort(running, record):
        if rng.random() < 0.2:
            running.abort(f"x{rng.randrange(12)}")

    undisturbed, disturbed = answers([]), answers([Aborts(abort)])
    for id, output in disturbed.items():
        whole = undisturbed[id].output_token_ids
        tokens = output.output_token_ids
        assert tokens == (whole if output.state == "finished" else whole[: len(tokens)])
    assert {o.state for o in disturbed.values()} <= {"finished", "aborted"}


@pytest.mark.parametrize("order", REGISTRY.names("order"))
def test_no_policy_trips_over_an_aborted_request(order: str) -> None:
    """Each order, with evictions, victims and retentions in turn: all are told `on_finish`, whatever the
    state."""
    rng = Random(order)
    aborted = 0
    for eviction in REGISTRY.names("eviction"):
        others = {
            role: rng.choice(REGISTRY.names(role)) for role in ("cache", "victim", "retention", "admission")
        }
        limits = EngineConfig(block_size=4, num_blocks=16, max_num_seqs=4, max_inflight=2, check=True)
        running = compose(engine=limits, order=order, eviction=eviction, predictor="noisy", **others)

        def abort(running, record):
            if (present := sorted(running.roster.present)) and rng.random() < 0.2:
                running.abort(rng.choice(present))

        running.observers.append(Aborts(abort))
        aborted += len(ids(running.run(arrivals(rng)), "aborted"))
        running.roster.pins.expire(float("inf"))
        assert clean(running)
    assert aborted > 10
