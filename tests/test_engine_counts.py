"""What a run counts: recomputed tokens against a count from plans alone, CPU seconds, and what a drop
leaves in the cache."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace

import pytest
from helpers.scripted import ask, engine, everybody
from test_fuzz_planted_bugs import plant

from core import roster as roster_module
from core.policy import Order, Retention
from core.request import RequestState
from core.spans import overlap, union
from core.testing.subject import Subject
from core.testing.trial import Decision, Trial

# ---- recomputed tokens ------------------------------------------------------------------------------------


def recomputed(decisions: list[Decision]) -> dict[str, int]:
    """Request id -> how often a position of it was planned again."""
    planned: dict[str, set[int]] = defaultdict(set)
    counts: dict[str, int] = defaultdict(int)
    for decision in decisions:
        for id, start, length in decision.chunks:
            for position in range(start, start + length):
                counts[id] += position in planned[id]
                planned[id].add(position)
    return counts


def compared(scheduler: str, cache: str, depth: int, seeds: range) -> tuple[int, int]:
    """(tokens recomputed, as counted from plans, requests whose count differs), over random cases that are
    short of blocks."""
    subject = Subject(
        (f"scheduler={scheduler}", f"cache={cache}", *(("order=srpt",) if scheduler == "preemptive" else ()))
    )
    total = wrong = 0
    for seed in seeds:
        case = replace(subject.case(seed), max_inflight=depth)
        trial = Trial(case, subject.roles)
        outcome = trial.run()
        if outcome.result is None:  # the ledger found it first
            wrong += 1
            continue
        truth = recomputed(outcome.decisions)
        total += sum(truth.values())
        wrong += sum(output.num_recomputed_tokens != truth[output.id] for output in outcome.result.outputs)
    return total, wrong


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_recomputed_tokens_are_positions_that_were_planned_before(depth: int) -> None:
    """With preemptions in flight, drop_tail, hits after a preemption, runs that are cut off, and steps that
    come back late."""
    for number, scheduler in enumerate(("chunked", "fcfs", "pd_split", "preemptive", "erratic")):
        for cache in ("none", "hash", "radix"):
            total, wrong = compared(scheduler, cache, depth, range(100 * number, 100 * number + 24))
            assert wrong == 0, (scheduler, cache)
            assert total > 0, (scheduler, cache)


#: What the count could get wrong: (class, method, source, planted source).
BUGS = {
    "completed steps only": (
        roster_module.Roster,
        "_count_preemption",
        "request.num_computed_tokens + request.num_scheduled_tokens",
        "request.num_computed_tokens",
    ),
    "a hit counts as computed": (
        roster_module.Roster,
        "admit",
        "request.planned_from = cached",
        "request.planned_from = 0",
    ),
    "everything below the highest position": (
        roster_module.Roster,
        "_count_preemption",
        "spans.union(request.planned_before, request.planned_from,",
        "spans.union(request.planned_before, 0,",
    ),
    "nothing": (
        roster_module.Roster,
        "schedule",
        "spans.overlap(request.planned_before, start, start + n)",
        "0",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_count_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *BUGS[bug])
    # the ledger would find it; here the count from plans has to
    monkeypatch.setattr("core.engine.Ledger", lambda *books: None)
    assert any(compared("erratic", "hash", depth, range(60))[1] for depth in (1, 2))


def test_spans_are_sets_of_positions() -> None:
    spans: tuple = ()
    positions: set[int] = set()
    for start, end in ((4, 8), (10, 12), (2, 3), (8, 9), (20, 20), (0, 11), (30, 31)):
        assert overlap(spans, start, end) == len(positions & set(range(start, end)))
        spans = union(spans, start, end)
        positions |= set(range(start, end))
        assert sorted(p for first, last in spans for p in range(first, last)) == sorted(positions)
    assert sorted(spans) == [(0, 12), (30, 31)]


# ---- seconds ---------------------------------------------------------------------------------------------


def test_policy_time_is_cpu_time() -> None:
    """A policy that sleeps costs nothing; one that works costs what it works, also where it plans nothing."""

    def sleeps(step, view):
        time.sleep(0.01)
        everybody(step, view)

    def works(step, view):
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass
        step.wake_at(1.0) if view.now < 1.0 else everybody(step, view)

    asleep, at_work = (
        engine(sleeps, check=False).run([ask(4, 5)]),
        engine(works, check=False).run([ask(4, 4)]),
    )
    assert asleep.num_steps == 5 and asleep.policy_time < 0.02
    assert at_work.num_steps == 4 and at_work.policy_time >= 0.05


# ---- retention=drop --------------------------------------------------------------------------------------


class DropSome(Retention):
    """Drops requests whose id begins with d."""

    def retain(self, request, kv, now):
        if request.id.startswith("d"):
            kv.drop(request)


def dropping(script=everybody, **options):
    return engine(script, roles={"retention": DropSome(), **options.pop("roles", {})}, **options)


def matchable(running, tokens: list[int]) -> int:
    """Blocks of this prefix that a new request would hit."""
    probe = ask(tokens, 1, id="probe", time=running.clock.inner.now())
    running.add(probe)
    running._ingest(running.clock.inner.now())
    (request,) = running.waiting
    return len(running.view.match(request).blocks)


PROMPT = [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_a_drop_forgets_a_twin_that_another_published_first() -> None:
    running = dropping()
    running.run([ask(PROMPT, 2, id="d1"), ask(PROMPT, 4, id="d2")])
    assert running.pool.num_cached == 0 and matchable(running, PROMPT) == 0


def test_a_drop_spares_what_somebody_else_holds_or_keeps() -> None:
    running = dropping()
    running.run([ask(PROMPT, 2, id="d1"), ask(PROMPT, 9, id="k2")])
    assert matchable(running, PROMPT) == 3, "k2 ran on, and keeps its content"
    running = dropping()
    running.run([ask(PROMPT, 9, id="d1"), ask([*PROMPT[:8], 2, 2, 2, 2, 2], 1, id="k2")])
    assert running.pool.num_cached == 3, "two blocks that they share, and k2's own one"


def test_a_request_that_ends_while_it_is_preempted_is_dropped_all_the_same() -> None:
    ended: list[RequestState] = []

    class Ends(Order):
        def order(self, view):
            return view.waiting

        def on_preempt(self, request, now):
            ended.append(request.state)

    def script(step, view):
        if view.step == 3 and view.lag:
            step.preempt(view.running[0])
            step.wake_at(view.now + 0.001)
        elif view.running or not view.lag:
            everybody(step, view)

    running = dropping(script, max_inflight=2, roles={"order": Ends()})
    (output,) = running.run([ask(PROMPT, 3, id="d1")]).outputs
    assert ended and output.num_preemptions == 1 and output.num_recomputed_tokens == 0, (
        "its last token came back after the preemption"
    )
    assert running.pool.num_cached == running.pool.num_used == 0
