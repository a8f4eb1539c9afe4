"""Thousands of tiny random runs against the KV oracle: every scheduler x cache x eviction triple, in every
mode of the loop.

What one run checks is in core/testing/trial.py; what it can find is in test_fuzz_planted_bugs.py.
"""

from __future__ import annotations

import pytest

from core.testing.case import Case
from core.testing.subject import Subject
from core.testing.trial import Trial
from core.testing.watch import Watch

SCHEDULERS, CACHES = ("fcfs", "chunked", "pd_split"), ("none", "hash", "radix")
SEEDS = 24  # a triple


def explain(case: Case, failure) -> str:
    steps = "\n".join(map(str, failure.decisions))
    return f"{failure.check}: {failure.message}\n{case}\n{steps}"


def run(subject: Subject, seeds, **options) -> dict[str, int]:
    """Runs the cases; fails on the first one that does. Returns what happened in them."""
    seen = dict.fromkeys(
        ("preemptions", "evictions", "cached tokens", "rejected", "interrupted", "in flight 2+"), 0
    )
    for seed in seeds:
        case = subject.case(seed)
        outcome = Trial(case, subject.roles, **options).run()
        if outcome.failure:
            pytest.fail(explain(case, outcome.failure), pytrace=False)
        result = outcome.result
        seen["preemptions"] += result.num_preemptions
        seen["evictions"] += result.num_evictions
        seen["cached tokens"] += sum(o.num_cached_tokens for o in result.outputs)
        seen["rejected"] += sum(o.state == "rejected" for o in result.outputs)
        seen["interrupted"] += result.status == "interrupted"
        seen["in flight 2+"] += case.max_inflight > 1
    return seen


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_triple_keeps_kv_references_and_answers_right(scheduler: str, cache: str) -> None:
    evictions = Subject().registry.names("eviction")
    assert {"lru", "fifo", "lfu"} <= set(evictions)
    for number, eviction in enumerate(evictions):
        subject = Subject((f"scheduler={scheduler}", f"cache={cache}", f"eviction={eviction}"))
        seen = run(subject, range(1000 * number, 1000 * number + SEEDS))
        assert seen["preemptions"] and seen["rejected"] and seen["in flight 2+"]
        assert bool(seen["evictions"]) == bool(seen["cached tokens"]) == (cache != "none")


@pytest.mark.parametrize("cache", ("hash", "radix"))
def test_blocks_that_go_with_all_that_hangs_under_them_keep_it_right(cache: str) -> None:
    for number, eviction in enumerate(Subject().registry.names("eviction")):
        subject = Subject((f"cache={cache}", "cache.subtree=true", f"eviction={eviction}"))
        seen = run(subject, range(1000 * number, 1000 * number + 8))
        assert seen["evictions"] and seen["cached tokens"]


def test_erratic_policies_cannot_break_the_core() -> None:
    seen = run(Subject(), range(1000))
    assert all(seen.values()), seen


def test_in_tree_policies_write_nothing_that_they_may_only_read() -> None:
    subject = Subject()
    for seed in range(60):
        case = subject.case(seed)
        outcome = Trial(case, subject.roles, watch=Watch()).run()
        assert outcome.failure is None, explain(case, outcome.failure)


def test_a_case_survives_json() -> None:
    subject = Subject()
    for seed in range(40):
        case = subject.case(seed)
        again = Case.from_json(case.to_json())
        assert again == case
    assert Trial(case, subject.roles).run().decision_hash == Trial(again, subject.roles).run().decision_hash
