"""Drafts: a plan may hold guesses of a request's next tokens; those that are right are tokens of the same
step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from helpers.scripted import ask, engine, everybody

from core.compose.hooks import load_registry
from core.errors import PolicyError
from core.outside import Observer
from core.policy import Scheduler
from core.request import Request
from core.testing.case import random_case
from core.testing.oracle import OracleExecutor, WrongKV, sampled_token
from core.testing.subject import Subject
from core.testing.trial import Outcome, Trial

REGISTRY = load_registry()
Guess = Callable[[Request], Sequence[int]]


def guesses(seed: int, vocab: int = 5) -> Guess:
    """The true tokens, up to a place by chance; then wrong ones."""

    def of(request: Request) -> list[int]:
        known = len(request.token_ids)
        chance = Random(f"{seed}/{request.id}/{known}")
        true = [sampled_token(seed, request.id, known + i, vocab) for i in range(chance.randint(0, 5))]
        right = chance.randint(0, len(true))
        return true[:right] + [(token + 1) % vocab for token in true[right:]]

    return of


def drafting(scheduler: Scheduler, guess: Guess) -> None:
    """Every request that this scheduler adds brings guesses."""
    plan = scheduler.plan

    def with_drafts(step, view) -> None:
        def one_by_one(requests):
            prompts = []
            for request in requests:
                prompts.append(request) if request.num_new_tokens > 1 else step.add(request)
            return prompts

        add = type(step).add
        step.add = lambda request, num_tokens=None: add(step, request, num_tokens, guess(request))
        step.add_decodes = one_by_one
        plan(step, view)

    scheduler.plan = with_drafts  # type: ignore[method-assign]


def outcome(
    seed: int, *choices: str, max_drafts: int = 3, executor: type[OracleExecutor] = OracleExecutor, **changes
) -> Outcome:
    case = replace(random_case(seed, {}), stop_after=None, **changes)

    def roles(case):
        made = Subject(choices).plain_roles()
        drafting(made["scheduler"], guesses(case.seed))
        return made

    limits = (5, 64, case.num_blocks, 0.01, case.token_seconds, case.eos, 4, case.placeholders)
    return Trial(case, roles, executor=executor(*limits, max_drafts=max_drafts)).run()


@pytest.mark.parametrize("cache", REGISTRY.names("cache"))
@pytest.mark.parametrize("scheduler", REGISTRY.names("scheduler"))
def test_every_scheduler_and_cache_takes_drafts(scheduler: str, cache: str) -> None:
    """Answers are those without drafts; KV, counts and books are checked at every step, two in flight as
    well."""
    for seed in range(8):
        found = outcome(
            seed, f"scheduler={scheduler}", "order=priority", f"cache={cache}", max_inflight=1 + seed % 2
        )
        assert found.failure is None, found.failure


def test_drafts_save_steps_and_an_executor_that_verifies_none_gets_none() -> None:
    counts = [outcome(3, "scheduler=chunked", max_drafts=most).result.num_steps for most in (0, 1, 4)]
    assert counts[0] > counts[1] >= counts[2]


def test_drafts_are_decisions() -> None:
    hashes = {outcome(3, "scheduler=chunked", max_drafts=most).decision_hash for most in (0, 2, 2)}
    assert len(hashes) == 2


class Gullible(OracleExecutor):
    """Takes every draft for right."""

    def _sample(self, request, position, drafts):
        new = super()._sample(request, position, ())
        more = list(drafts[: max(0, request.max_num_tokens - position - 1)])
        self._tokens[request.index] += more
        return new + more


class Forgetful(OracleExecutor):
    """Says that fewer drafts were right than it keeps."""

    def collect(self, ticket):
        result = super().collect(ticket)
        return replace(result, tokens=[new[:1] for new in result.tokens])


@pytest.mark.parametrize("executor", [Gullible, Forgetful])
def test_an_executor_that_verifies_wrongly_is_found(executor: type[OracleExecutor]) -> None:
    found = [outcome(seed, "scheduler=chunked", executor=executor).failure for seed in range(6)]
    assert {failure.check for failure in found if failure} & {"kv oracle", "answers"}


def test_a_count_that_is_kept_for_a_wrong_draft_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its KV is of another token, and is read as if it were not."""
    from core import roster

    monkeypatch.setattr(roster, "_without_wrong_drafts", lambda plan, tokens: plan.lengths)
    assert any(outcome(seed, "scheduler=chunked").failure for seed in range(6))


class Plans(Observer):
    def __init__(self) -> None:
        self.chunks: list[tuple[int, int, tuple[int, ...], list[int]]] = []

    def on_step(self, record) -> None:
        for chunk, new in zip(record.plan.chunks, record.tokens, strict=True):
            self.chunks.append((chunk.start, chunk.length, tuple(chunk.drafts), new))


def planned(guess: Guess, prompt: int = 6, answer: int = 6, max_drafts: int = 4, **limits) -> list:
    plans = Plans()

    def script(step, view) -> None:
        for request in (*view.running, *view.waiting):
            step.add(request, drafts=guess(request))

    running = engine(
        script, executor=OracleExecutor(num_blocks=16, max_drafts=max_drafts), observers=[plans], **limits
    )
    running.run([ask(prompt, answer, id="x")])
    return plans.chunks


def true(count: int) -> Guess:
    return lambda r: [sampled_token(0, r.id, len(r.token_ids) + i, 5) for i in range(count)]


def test_a_chunk_carries_its_drafts() -> None:
    first, second, third = planned(true(3))
    answer = [sampled_token(0, "x", position, 5) for position in range(6, 12)]
    assert first == (0, 6, (), answer[:1])  # a prompt has none
    assert second == (6, 4, tuple(answer[1:4]), answer[1:5])
    assert third == (10, 1, (), answer[5:])  # the last token needs no draft


def test_what_was_drafted_wrongly_is_computed_again() -> None:
    wrong: Guess = lambda r: [(sampled_token(0, r.id, len(r.token_ids), 5) + 1) % 5] * 2  # noqa: E731
    assert [(start, length) for start, length, _, _ in planned(wrong, answer=4)] == [
        (0, 6),
        (6, 3),
        (7, 2),
        (8, 1),
    ]


def test_drafts_are_cut_to_the_budget_the_pool_and_the_answer() -> None:
    assert max(length for _, length, drafts, _ in planned(true(9), answer=12, max_drafts=2) if drafts) == 3
    assert (
        max(
            length
            for _, length, drafts, _ in planned(true(9), answer=12, max_drafts=9, max_num_batched_tokens=6)
            if drafts
        )
        == 6
    )
    assert (
        max(start + length for start, length, _, _ in planned(true(9), answer=7, max_drafts=9)) == 6 + 7 - 1
    )
    assert planned(true(9), answer=12, max_drafts=9, num_blocks=5)[-1][3]  # 17 of 20 places: it ends


def test_nobody_is_preempted_for_a_draft() -> None:
    def script(step, view) -> None:
        for request in (*view.running, *view.waiting):
            step.add(request, drafts=true(3)(request))

    executor = OracleExecutor(num_blocks=4, max_drafts=3)
    result = engine(script, executor=executor, num_blocks=4).run([ask(6, 2, id="a"), ask(5, 3, id="b")])
    assert result.num_preemptions == 0 and all(o.state == "finished" for o in result.outputs)


def test_a_draft_is_a_token_id() -> None:
    for drafts in ([5], [-1], [None], ["a"]):
        with pytest.raises(PolicyError, match="expected token ids below 5"):
            planned(lambda r, drafts=drafts: drafts if r.token_times else ())


def test_a_request_with_drafts_in_flight_is_not_planned_again() -> None:
    steps: list[int] = []

    def script(step, view) -> None:
        for request in (*view.running, *view.waiting):
            step.add(request, drafts=true(2)(request) if len(request.token_ids) == request.num_tokens else ())
        steps.append(step.num_seqs)

    running = engine(script, executor=OracleExecutor(num_blocks=16, max_drafts=2), max_inflight=2)
    assert len(running.run([ask(6, 9, id="x")]).outputs[0].output_token_ids) == 9
    assert 0 in steps


def test_the_oracle_refuses_drafts_of_a_chunk_that_does_not_sample() -> None:
    running = engine(everybody, executor=OracleExecutor(num_blocks=16, max_drafts=2))
    launch = running.executor.launch
    running.executor.launch = lambda plan: launch(replace(plan, drafts={0: [1]}))  # type: ignore[method-assign]
    with pytest.raises(WrongKV):
        running.run([ask(6, 3)])
