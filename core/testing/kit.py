"""The conformance kit: what `python -m headway check` and `pytest --pyargs core.testing` run on a
composition."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from ..compose.build import Composition, Run, build
from ..compose.config import EngineConfig, ModelConfig, ResultsConfig
from ..engine import Engine
from ..errors import HeadwayError
from ..inputs import Arrival, SamplingParams
from ..policy import Role
from . import starve
from .case import VOCAB, Case, feasible
from .shrink import shrink
from .subject import Subject
from .trial import Decision, Failure, Outcome, Trial
from .virtual import VirtualExecutor
from .watch import Watch
from .worker import VARIANTS, Workers

PASS, FAIL, NOTE = "pass", "FAIL", "note"
#: Rows that one pass over the seeds fills; every failure of a run belongs to one of them.
RUN_CHECKS = ("kv oracle", "invariants", "answers", "progress", "exceptions", "read-only")
ENOUGH = 20  # failing runs after which no more are made
WATCH_EVERY = 5  # seeds; comparing all state around every call is slow
SLOW_US = 300  # microseconds per step that a policy may cost at 256 running and 64 waiting
TOO_SLOW_US = 5000
MOST_TURNS = 10  # of the loop, for each step that is measured


@dataclass(frozen=True)
class Verdict:
    """One row of the report."""

    check: str
    runs: int
    verdict: str
    detail: str = ""
    seed: int | None = None  # the smallest one that fails
    case: Case | None = None  # shrunk
    steps: tuple[str, ...] = ()  # that lead to the failure

    @property
    def failed(self) -> bool:
        return self.verdict == FAIL


def run_all(subject: Subject, seeds: Sequence[int]) -> Iterator[Verdict]:
    """Every check, in the order of the report."""
    for check in CHECKS.values():
        yield from check(subject, seeds)


# ---- runs against the KV oracle --------------------------------------------------------------------------


def check_runs(subject: Subject, seeds: Sequence[int]) -> Iterator[Verdict]:
    """KV oracle, invariants, answers, progress, exceptions and read-only, from one pass over the seeds."""
    found: dict[str, tuple[int, Failure]] = {}
    runs = watched = rejected = failed = 0
    for i, seed in enumerate(seeds):
        if failed == ENOUGH:
            break
        runs += 1
        outcome = _trial(subject, subject.case(seed), i % WATCH_EVERY == 0)
        watched += i % WATCH_EVERY == 0
        rejected += outcome.num_rejected
        if outcome.failure:
            failed += 1
            found.setdefault(outcome.failure.check, (seed, outcome.failure))
    for check in RUN_CHECKS:
        count = watched if check == "read-only" else runs
        if check in found:
            yield _shrunk(subject, check, count, *found[check])
        else:
            yield Verdict(
                check,
                count,
                PASS,
                f"{rejected} requests were refused by a policy" if check == "answers" and rejected else "",
            )


def _trial(subject: Subject, case: Case, watched: bool) -> Outcome:
    return Trial(case, subject.roles, watch=Watch() if watched else None).run()


def _shrunk(subject: Subject, check: str, runs: int, seed: int, failure: Failure) -> Verdict:
    watched = check == "read-only"
    found = {"failure": failure}

    def fails(case: Case) -> bool:
        now = _trial(subject, case, watched).failure
        if now is None or (now.check, now.error) != (check, failure.error):
            return False
        found["failure"] = now
        return True

    case = shrink(subject.case(seed), fails, 300 if watched else 1000)
    return Verdict(
        check=check,
        runs=runs,
        verdict=FAIL,
        detail=found["failure"].message,
        seed=seed,
        case=case,
        steps=tuple(map(str, found["failure"].decisions)),
    )


# ---- determinism -----------------------------------------------------------------------------------------


DETERMINISM_SEEDS = 40
CAUSES = {
    "process": "it depends on addresses (id(), a set of objects), or on what the operating system hands out",
    "hash seed": "it depends on the order of a set, or on hash() of a string",
    "clock": "it reads a clock; time comes from view.now",
    "global random": "it uses the global random generator; chance comes from self.rng",
}


def check_determinism(
    subject: Subject, seeds: Sequence[int], workers: Workers | None = None
) -> Iterator[Verdict]:
    """The same case in processes that differ in hash seed, clock or global chance: the decisions must not."""
    if workers is None:
        with Workers(subject.modules) as ours:
            yield from check_determinism(subject, seeds, ours)
        return
    seeds = seeds[:DETERMINISM_SEEDS]
    found: dict[str, int] = {}
    for seed in seeds:
        answers = workers.run(subject.words, subject.case(seed))
        for variant, answer in answers.items():
            if answer.decisions != answers["base"].decisions and not answers["base"].failure:
                found.setdefault(variant.removesuffix(" 2"), seed)
    for variant in CAUSES:
        if variant not in found:
            yield Verdict(f"same with another {variant}", len(seeds), PASS)
        elif variant != "process" and "process" in found:
            yield Verdict(
                f"same with another {variant}", len(seeds), NOTE, "not told apart: two equal processes differ"
            )
        else:
            yield _shrunk_difference(subject, workers, variant, len(seeds), seed=found[variant])


def _shrunk_difference(subject: Subject, workers: Workers, variant: str, runs: int, seed: int) -> Verdict:
    others = [v for v in VARIANTS if v.removesuffix(" 2") == variant]

    def differ(case: Case) -> list[str] | None:
        base, *rest = workers.run(subject.words, case, ["base", *others]).values()
        return next(
            (
                _first_difference(base.decisions, other.decisions)
                for other in rest
                if other.decisions != base.decisions
            ),
            None,
        )

    case = shrink(subject.case(seed), lambda c: differ(c) is not None, 150)
    return Verdict(
        check=f"same with another {variant}",
        runs=runs,
        verdict=FAIL,
        detail=CAUSES[variant],
        seed=seed,
        case=case,
        steps=tuple(differ(case) or ()),
    )


def _first_difference(one: list[str], other: list[str]) -> list[str]:
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    ending = "(the run ends)"
    return [
        *one[:same],
        f"here:  {one[same] if same < len(one) else ending}",
        f"there: {other[same] if same < len(other) else ending}",
    ]


# ---- the truth boundary ----------------------------------------------------------------------------------


def check_truth_boundary(subject: Subject, seeds: Sequence[int]) -> Iterator[Verdict]:
    """Decisions must not change with a hidden output length before that request ends, nor with arrivals that
    lie ahead."""
    name = "truth boundary"
    if seeing := [c.__name__ for c in subject.classes() if c.sees_truth]:
        yield Verdict(name, 0, NOTE, f"{', '.join(seeing)} declares sees_truth=True: its results are stamped")
        return
    runs = 0
    for seed in seeds:
        case = subject.case(seed)
        for changed, what in _hidden_changes(case):
            pair = _differ_before(subject, *changed)
            runs += 1
            if pair is not None:
                yield _shrunk_peek(subject, name, runs, seed, what=what)
                return
    yield Verdict(name, runs, PASS)


def _hidden_changes(case: Case) -> Iterator[tuple[tuple[Case, Case, str], str]]:
    """(one case, the other, id of the request whose end or arrival tells them apart), and what differs."""
    rng = Random(f"hidden/{case.seed}")
    case = replace(case, stop_after=None)
    for i, ask in enumerate(case.asks):
        if ask.max_tokens > 1 and feasible(case, list(ask.prompt), ask.max_tokens, None):
            lengths = rng.sample(range(1, ask.max_tokens + 1), 2)
            one, other = (
                replace(case, asks=case.asks[:i] + (replace(ask, output_len=n),) + case.asks[i + 1 :])
                for n in lengths
            )
            yield (
                (one, other, ask.id),
                f"the true output length of {ask.id} is {lengths[0]} in one run and {lengths[1]} in the "
                "other",
            )
            break
    later = [a for a in case.asks if a.time > case.asks[0].time]
    if later:
        at = rng.choice(later)
        yield (
            (case, replace(case, asks=tuple(a for a in case.asks if a.time < at.time)), at.id),
            f"{at.id} and what follows never arrive in the other run",
        )


def _differ_before(
    subject: Subject, one: Case, other: Case, id: str
) -> tuple[list[Decision], list[Decision]] | None:
    """The decisions of both runs up to the moment that tells them apart, where they are not equal."""
    first, second = (Trial(c, subject.roles).run() for c in (one, other))
    if first.result is None or second.result is None:
        return None  # another check's failure
    ends = [o.finish_time for r in (first.result, second.result) for o in r.outputs if o.id == id]
    moment = min(ends) if len(ends) == 2 else next(a.time for a in one.asks if a.id == id)
    before = [[d for d in o.decisions if d.now < moment] for o in (first, second)]
    return (before[0], before[1]) if before[0] != before[1] else None


def _shrunk_peek(subject: Subject, name: str, runs: int, seed: int, what: str) -> Verdict:
    def first(case: Case) -> tuple[tuple[list[Decision], list[Decision]], str] | None:
        for changed, words in _hidden_changes(case):
            if pair := _differ_before(subject, *changed):
                return pair, words
        return None

    case = shrink(subject.case(seed), lambda c: first(c) is not None, 300)
    found = first(case)
    if found is None:
        return Verdict(name, runs, FAIL, what, seed=seed, case=case)
    pair, what = found
    return Verdict(
        check=name,
        runs=runs,
        verdict=FAIL,
        detail=f"{what}, and decisions differ before anybody could know",
        seed=seed,
        case=case,
        steps=tuple(_first_difference([str(d) for d in pair[0]], [str(d) for d in pair[1]])),
    )


# ---- starvation ------------------------------------------------------------------------------------------


ENOUGH_SCENES = 3  # in which a request starves; each takes a thousand others
ASKED_WHO_GOES = ("scheduler", "order", "victim", "chunk", "admission", "predictor")


def check_starvation(subject: Subject, seeds: Sequence[int]) -> Iterator[Verdict]:
    """One odd request among an endless stream of others, for everything that may set it apart."""
    if subject.choices and not set(ASKED_WHO_GOES) & set(subject.choices):
        yield Verdict("starvation", 0, NOTE, "none of these policies decides who goes first")
        return
    found: list[starve.Starved] = []
    for scene in starve.SCENES:
        if len(found) == ENOUGH_SCENES:
            break
        try:
            if starving := starve.starved(scene, subject.plain_roles()):
                found.append(starving)
        except HeadwayError as error:
            yield Verdict("starvation", len(starve.SCENES), FAIL, f"{scene.name}: {error}")
            return
    reasons = [f"{c.__name__}: {c.may_starve}" for c in subject.classes() if c.may_starve]
    detail = "; ".join(map(str, found))
    if found and reasons:
        yield Verdict("starvation", len(starve.SCENES), NOTE, f"{detail}. By design: {'; '.join(reasons)}")
    elif found:
        yield Verdict(
            "starvation",
            len(starve.SCENES),
            FAIL,
            f"{detail}. If that is meant, say why: may_starve = '...' in the class",
        )
    else:
        yield Verdict("starvation", len(starve.SCENES), PASS)


# ---- sim and replay --------------------------------------------------------------------------------------

SHAPE = ModelConfig(
    name_or_path="shape of the kit",
    load_format="dummy",
    architecture="LlamaForCausalLM",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    intermediate_size=128,
    vocab_size=50,
    tie_word_embeddings=True,
    max_position_embeddings=256,
)


def check_parity(subject: Subject, seeds: Sequence[int]) -> Iterator[Verdict]:
    """A run in the simulator, and its record played again, take the same decisions."""
    name = "sim = replay"
    if not {"sim", "replay"} <= set(subject.registry.names("executor")):
        yield Verdict(name, 0, NOTE, "executor=sim or executor=replay is not available")
        return
    seeds = seeds[:5]
    for seed in seeds:
        case = replace(subject.case(seed), stop_after=None)
        with tempfile.TemporaryDirectory() as directory:
            try:
                first = _simulated(subject, case, ("sim", {}), Path(directory))
                second = _simulated(subject, case, ("replay", {"path": directory}), None)
            except HeadwayError as error:
                yield Verdict(name, len(seeds), FAIL, str(error), seed=seed, case=case)
                return
        if first != second:
            yield Verdict(name, len(seeds), FAIL, f"decision logs {first} and {second}", seed=seed, case=case)
            return
    yield Verdict(name, len(seeds), PASS)


def _simulated(
    subject: Subject, case: Case, executor: tuple[str, dict[str, Any]], directory: Path | None
) -> str:
    config = EngineConfig(
        case.block_size,
        case.num_blocks,
        case.max_num_seqs,
        case.max_num_batched_tokens,
        max_inflight=case.max_inflight,
    )
    composition = Composition(
        {**subject.plain_choices(), "executor": executor},
        config,
        SHAPE,
        results=ResultsConfig(["replay.npz"]),
        seed=case.seed,
    )
    run: Run = build(subject.registry, composition, directory=directory)
    run.engine.observers = [o for o in run.engine.observers if type(o).__name__ in ("StepLog", "Recorder")]
    return run.engine.run([ask.arrival() for ask in case.asks]).decision_hash


# ---- cost ------------------------------------------------------------------------------------------------


class NothingMeasured(HeadwayError):
    """So little ran that its cost says nothing."""


def check_cost(subject: Subject, seeds: Sequence[int]) -> Iterator[Verdict]:
    """Microseconds per step of planning and book-keeping with 256 requests running and 64 waiting, beside the
    plain composition's."""
    plain = min(_step_cost(Subject()) for _ in range(2))
    try:
        ours = min(_step_cost(subject) for _ in range(2))
    except NothingMeasured as error:
        yield Verdict("cost", 0, NOTE, str(error))
        return
    except HeadwayError as error:
        yield Verdict("cost", 1, FAIL, str(error))
        return
    detail = f"{ours:.0f} us per step at 256 running and 64 waiting (plain: {plain:.0f})"
    verdict = FAIL if ours - plain > TOO_SLOW_US else NOTE if ours - plain > SLOW_US else PASS
    yield Verdict(
        "cost", 2, verdict, detail + ("" if verdict == PASS else f": more than {SLOW_US} us above it")
    )


def _step_cost(subject: Subject, running: int = 256, waiting: int = 64, steps: int = 30) -> float:
    roles: dict[str, Role] = {**subject.plain_roles(), "executor": VirtualExecutor()}
    prompt = 32
    engine = Engine(roles, EngineConfig(16, (running + waiting) * 16, running, 8192))
    for i in range(running + waiting):
        engine.add(
            Arrival(0.0, [(i * 7 + j * i) % VOCAB for j in range(prompt)], SamplingParams(max_tokens=150))
        )
    for _ in range(60):
        engine.step()
    gc.collect()
    spent, first, started = engine.counts.policy_time, engine.counts.num_steps, len(engine.running)
    for _ in range(MOST_TURNS * steps):
        if engine.counts.num_steps == first + steps or not engine.step():
            break
    if engine.counts.num_steps - first < steps or started < running:
        raise NothingMeasured(
            f"nothing was measured: after 60 turns {started} of {running} requests that fit were running, "
            f"and {engine.counts.num_steps - first} of "
            f"{steps} steps were planned in the {MOST_TURNS * steps} turns after that"
        )
    return (engine.counts.policy_time - spent) / steps * 1e6


Check = Callable[[Subject, Sequence[int]], Iterator[Verdict]]
CHECKS: dict[str, Check] = {
    "runs": check_runs,
    "determinism": check_determinism,
    "truth": check_truth_boundary,
    "starvation": check_starvation,
    "parity": check_parity,
    "cost": check_cost,
}
