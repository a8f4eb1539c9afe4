"""The conformance kit rejects what is wrong, for the right reason and with a small example, and accepts what
is in the box."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.bad_policies import BAD

from core.errors import ConfigError
from core.policy import Admission, Admit, Defer, Order
from core.request import Request
from core.testing import check, kit, starve
from core.testing.subject import RANDOM_ROLES, Subject, kit_registry
from core.testing.worker import Workers
from core.view import View

FILE = str(Path(__file__).parent / "helpers" / "bad_policies.py")
SEEDS = range(120)
#: The part of the kit that fills a row of the report.
PART = {
    "truth boundary": "truth",
    "starvation": "starvation",
    "sim = replay": "parity",
    "cost": "cost",
    **dict.fromkeys(kit.RUN_CHECKS, "runs"),
}


@pytest.fixture(scope="module")
def workers():
    with Workers((FILE,)) as running:
        yield running


def judge(subject: Subject, row: str, workers: Workers, seeds=SEEDS) -> dict[str, kit.Verdict]:
    if row.startswith("same with"):
        verdicts = kit.check_determinism(subject, seeds, workers)
    else:
        verdicts = kit.CHECKS[PART[row]](subject, seeds)
    return {v.check: v for v in verdicts}


@pytest.mark.parametrize("policy", BAD, ids=lambda p: p.__name__)
def test_a_bad_policy_is_rejected(policy: type, workers: Workers) -> None:
    row = BAD[policy]
    subject = Subject((f"{policy.role}={policy.__name__.lower()}",), (FILE,))
    verdict = judge(subject, row, workers)[row]
    assert verdict.failed, verdict
    report = check.explain(verdict)
    assert row in report
    if row not in ("starvation", "cost", "sim = replay"):
        assert verdict.case is not None and verdict.seed is not None
        assert len(verdict.case.asks) <= 4 and verdict.case.num_tokens <= 80, f"not shrunk:\n{report}"
        assert "requests" not in report or verdict.steps or row in ("progress", "invariants", "exceptions")


def test_the_report_names_the_policy_the_seed_and_the_steps(capsys) -> None:
    code = check.main(["scheduler=plansthepreempted", "--module", FILE, "--only", "runs", "--seeds", "40"])
    text = capsys.readouterr().out
    assert code == 1
    assert "invariants                          40  FAIL" in text
    assert "plugin scheduler=plansthepreempted" in text and "planned after this policy preempted it" in text
    assert (
        "first at seed" in text
        and "the smallest case that fails like this" in text
        and "step by step" in text
    )


def in_the_box() -> list[str]:
    """Every policy once: one that has two names is checked under the last of them."""
    registry = kit_registry()
    names = {
        registry.get(role, name).factory: f"{role}={name}"
        for role in RANDOM_ROLES
        for name in registry.names(role)
    }
    return list(names.values())


#: What a composition needs beside the policy that is checked.
COMPANIONS = {
    "scheduler=preemptive": ("order=srpt",),
    "scheduler=selective": ("order=niyama",),
    "scheduler=jitserve": ("order=jitserve",),
}


@pytest.mark.parametrize("word", in_the_box())
def test_what_is_in_the_box_passes(word: str, workers: Workers) -> None:
    subject = Subject((word, *COMPANIONS.get(word, ())), (FILE,))
    subject.refuse_what_cannot_be()
    seeds = range(16)
    parts = [
        kit.check_runs(subject, seeds),
        kit.check_determinism(subject, seeds[:4], workers),
        kit.check_truth_boundary(subject, seeds[:8]),
    ]
    parts += [kit.check_starvation(subject, seeds), kit.check_parity(subject, seeds[:1])]
    for verdict in (v for part in parts for v in part):
        assert not verdict.failed, check.explain(verdict)


def test_every_name_of_a_policy_is_that_of_one_that_is_checked() -> None:
    registry, checked = kit_registry(), set(in_the_box())
    unchecked = [
        (role, name)
        for role in RANDOM_ROLES
        for name in registry.names(role)
        if f"{role}={name}" not in checked
    ]
    assert unchecked == [("scheduler", "fcfs")]
    assert registry.get("scheduler", "fcfs").factory is registry.get("scheduler", "prefill_first").factory


def test_starving_by_design_is_noted_with_its_reason(monkeypatch) -> None:
    monkeypatch.setattr(starve, "SCENES", starve.SCENES[:1])

    class Declared(Order):
        may_starve = "the smallest goes first"

    subject = Subject(("order=newestfirst",), (FILE,))
    (verdict,) = kit.check_starvation(subject, ())
    assert verdict.failed and "may_starve" in verdict.detail
    subject.classes = lambda: [Declared]
    (verdict,) = kit.check_starvation(subject, ())
    assert verdict.verdict == kit.NOTE and "the smallest goes first" in verdict.detail


def test_who_declares_to_see_the_truth_is_noted() -> None:
    (verdict,) = kit.check_truth_boundary(Subject(("predictor=oracle",)), range(3))
    assert verdict.verdict == kit.NOTE and "sees_truth=True" in verdict.detail


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("order", "expected role=name"),
        ("ordre=fcfs", "Did you mean order"),
        ("order=fcsf", "Did you mean fcfs"),
        ("scheduler.chunksize=3", "has no parameter 'chunksize'"),
        ("executor=sim", "the kit checks policies"),
    ],
)
def test_bad_words_are_refused(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Subject((word,))


def test_a_composition_that_cannot_be_is_refused_before_any_run() -> None:
    with pytest.raises(ConfigError, match="ranks running requests"):
        Subject(("scheduler=preemptive",)).refuse_what_cannot_be()


def test_parameters_have_their_types() -> None:
    subject = Subject(
        (
            "scheduler=chunked",
            "scheduler.chunk_size=3",
            "scheduler.token_budget=null",
            "victim.mode=drop_tail",
        )
    )
    assert subject.choices == {
        "scheduler": ("chunked", {"chunk_size": 3, "token_budget": None}),
        "victim": ("newest", {"mode": "drop_tail"}),
    }


@dataclass
class OpensLater(Admission):
    """Lets `many` start, and defers the rest for a day."""

    many: int = 0

    def admit(self, request: Request, view: View) -> Admit | Defer:
        return Admit() if view.num_running < self.many else Defer(view.now + 86400.0)


@pytest.mark.parametrize(
    ("many", "says"),
    [(0, "0 of 256 requests that fit were running, and 0 of 30 steps"), (10, "10 of 256 requests")],
)
def test_a_cost_is_said_only_of_what_ran(many: int, says: str) -> None:
    subject = Subject()
    subject.plain_roles = lambda: {**Subject().plain_roles(), "admission": OpensLater(many)}
    (verdict,) = kit.check_cost(subject, ())
    assert verdict.verdict == kit.NOTE and "nothing was measured" in verdict.detail and says in verdict.detail
    (verdict,) = kit.check_cost(Subject(), ())
    assert verdict.verdict == kit.PASS and "us per step at 256 running and 64 waiting" in verdict.detail
