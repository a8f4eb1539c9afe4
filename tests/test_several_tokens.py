"""One step may give a request several tokens: every scheduler and cache, the ends of answers, the log,
records."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.scripted import ask, engine, everybody

from core.compose.hooks import load_registry
from core.inputs import Arrival, SamplingParams
from core.outside import Observer
from core.testing.case import random_case
from core.testing.oracle import OracleExecutor
from core.testing.subject import Subject
from core.testing.trial import Outcome, Trial
from headway import ConfigError, Tokens
from plugins.executors.record import recording
from plugins.executors.replay import Replay

REGISTRY = load_registry()
SCHEDULERS, CACHES = REGISTRY.names("scheduler"), REGISTRY.names("cache")


class Two(OracleExecutor):
    """Gives a request that samples two tokens where it has room for them, and checks every read of KV."""

    def __init__(self, case, most: int = 2) -> None:
        super().__init__(
            5,
            64,
            case.num_blocks,
            0.01,
            case.token_seconds,
            case.eos,
            4,
            case.placeholders,
            tokens_per_step=most,
        )


def outcome(seed: int, *choices: str, most: int = 2, **changes) -> Outcome:
    case = replace(random_case(seed, {}), stop_after=None, **changes)
    trial = Trial(case, lambda case: Subject(choices).plain_roles(), executor=Two(case, most))
    found = trial.run()
    assert found.failure is None, f"{case}\n{found.failure}"
    return found


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_and_cache_takes_two_tokens_per_step(scheduler: str, cache: str) -> None:
    """Answers are those of one token per step; KV, counts and books are checked at every step."""
    for seed in range(6):
        composed = (f"scheduler={scheduler}", "order=priority", f"cache={cache}")
        for depth in (1, 2):
            assert (
                outcome(seed, *composed, max_inflight=depth).decision_hash
                == outcome(seed, *composed, max_inflight=depth).decision_hash
            )


def test_both_indexes_decide_alike() -> None:
    for seed in range(10):
        hashes = {
            outcome(seed, "scheduler=chunked", f"cache={cache}").decision_hash for cache in ("hash", "radix")
        }
        assert len(hashes) == 1


def test_fewer_steps_for_the_same_answers() -> None:
    one, two = (outcome(3, "scheduler=chunked", most=most).result for most in (1, 2))
    assert {o.id: o.output_token_ids for o in one.outputs} == {o.id: o.output_token_ids for o in two.outputs}
    assert two.num_steps < one.num_steps


class Steps(Observer):
    def __init__(self) -> None:
        self.tokens: list[list[list[int]]] = []

    def on_step(self, record) -> None:
        self.tokens.append(list(record.tokens))
        assert record.emitted == sum(map(len, record.tokens))


def answered(arrival: Arrival, most: int = 3, **limits) -> tuple:
    """(output, what each step gave it) of a request alone."""
    steps = Steps()
    executor = OracleExecutor(num_blocks=16, tokens_per_step=most)
    running = engine(everybody, executor=executor, observers=[steps], **limits)
    return running.run([arrival]).outputs[0], [new[0] for new in steps.tokens if new[0]]


def test_what_lies_behind_an_end_is_dropped() -> None:
    """An answer ends at its limit, at a stop token, at its emulated length and at the context, also in the
    middle of a step's tokens."""
    free, given = answered(ask(6, 8, id="x"))
    tokens = free.output_token_ids
    assert [len(new) for new in given] == [3, 3, 2] and free.finish_reason == "length"
    stop = tokens[4]
    ended, given = answered(
        Arrival(0.0, ask(6).prompt_token_ids, SamplingParams(max_tokens=8, stop_token_ids=(stop,)), id="x")
    )
    expected = tokens[: tokens.index(stop) + 1]
    assert (ended.output_token_ids, ended.finish_reason, ended.stop_reason) == (expected, "stop", stop)
    assert [token for new in given for token in new] == expected
    hidden, given = answered(replace(ask(6, 8, id="x"), output_len=4))
    assert (hidden.output_token_ids, hidden.finish_reason) == (tokens[:4], "stop") and [
        len(new) for new in given
    ] == [3, 1]
    short, _ = answered(ask(6, 50, id="x"), max_model_len=11)
    assert (short.output_token_ids, short.finish_reason) == (tokens[:5], "length")


def test_tokens_of_one_step_have_its_time() -> None:
    output, given = answered(ask(6, 8, id="x"))
    times = [time for new, time in zip(given, sorted(set(output.token_times)), strict=True) for _ in new]
    assert output.token_times == times


def test_a_request_that_may_be_given_several_is_in_one_plan_at_a_time() -> None:
    """Nobody knows where its next chunk begins while they are sampled."""
    steps: list[int] = []

    def script(step, view) -> None:
        everybody(step, view)
        steps.append(step.num_seqs)

    running = engine(script, executor=OracleExecutor(num_blocks=16, tokens_per_step=2), max_inflight=2)
    assert running.run([ask(6, 6)]).outputs[0].finish_reason == "length"
    assert steps[:3] == [1, 0, 1]


def test_a_record_of_several_tokens_per_step_is_replayed(tmp_path) -> None:
    arrivals = [ask(6, 7, id="a"), ask(5, 4, id="b")]
    first = engine(
        everybody, executor=OracleExecutor(num_blocks=16, tokens_per_step=3), observers=recording(tmp_path)
    ).run(arrivals)
    executor = Replay(str(tmp_path))
    executor.prepare()
    again = engine(everybody, executor=executor).run(arrivals)
    assert again.decision_hash == first.decision_hash
    assert [(o.output_token_ids, o.token_times) for o in again.outputs] == [
        (o.output_token_ids, o.token_times) for o in first.outputs
    ]


def test_tokens_read_as_a_list_per_request() -> None:
    lists = [[1], [], [2, 3, 4]]
    tokens = Tokens.of(lists)
    assert (
        list(tokens) == lists == [tokens[i] for i in range(3)]
        and tokens[-1] == [2, 3, 4]
        and tokens[1:] == lists[1:]
    )
    assert tokens == lists and len(tokens) == 3 and tokens.first == [1, -1, 2] and tokens.more == {2: [3, 4]}
    assert (
        tokens != [[1], [], [2, 3]]
        and Tokens([5, -1]) == [[5], []]
        and repr(tokens) == "Tokens.of([[1], [], [2, 3, 4]])"
    )


def test_an_oracle_gives_at_least_one() -> None:
    with pytest.raises(ConfigError, match="tokens_per_step"):
        OracleExecutor(tokens_per_step=0)
