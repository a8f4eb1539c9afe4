"""JITServe: goodput in each second of work, and groups of similar lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from helpers.policy_runs import REGISTRY, Server, Steps, ask, compose, finishing, run

from core.compose.build import build_roles
from core.compose.config import EngineConfig
from core.compose.defaults import default_choices
from core.engine import Engine
from core.errors import ConfigError
from core.inputs import SLO, Arrival
from core.keyed import KeyOrder
from core.request import Request

ONE = EngineConfig(max_num_seqs=1)
LOOSE = SLO(ttft=100.0, tpot=1.0)


def queued(*waiting: Arrival, **order: Any) -> list[str]:
    """Order of finishing of requests that wait behind one that runs for 0.5 s; a step takes 10 ms."""
    first = ask(0.0, 1, 50, "first", LOOSE)
    result = run(
        [first, *waiting], order=("jitserve", order), predictor="oracle", engine=ONE, server=Server()
    )
    return finishing(result)[1:]


def test_most_goodput_in_each_second_of_work_goes_first():
    """All in time: (prompt + 8 * answer) / answer, so 18, 13 and 9 for each token of work."""
    asked = [ask(0.1, 100, 100, "9", LOOSE), ask(0.1, 100, 20, "13", LOOSE), ask(0.1, 100, 10, "18", LOOSE)]
    assert queued(*asked) == ["18", "13", "9"]
    asked = [ask(0.1, 500, 10, "long prompt", LOOSE), ask(0.1, 10, 10, "short prompt", LOOSE)]
    assert queued(*asked) == ["long prompt", "short prompt"]


@pytest.mark.parametrize("target", [SLO(e2el=0.45), SLO(ttft=0.2, tpot=0.02)])
def test_who_cannot_make_its_target_is_worth_nothing_and_goes_behind_all_that_can(target: SLO):
    """When the first one ends, 0.4 s of "late"'s time have gone by; its 10 tokens take 0.1 s more."""
    asked = [ask(0.1, 100, 10, "late", target), ask(0.1, 100, 40, "can", SLO(e2el=2.0))]
    assert queued(*asked) == ["can", "late"]
    assert queued(*asked, penalty=0.1) == ["late", "can"]


def test_calls_of_one_session_that_are_here_together_count_as_one():
    """A call is worth 13 for each token of work, two together 26, and "alone" 14."""
    alone = ask(0.1, 60, 10, "alone", LOOSE)
    together = [ask(0.11, 50, 10, f"call {i}", LOOSE, session="s") for i in range(2)]
    assert queued(alone, *together) == ["call 0", "alone", "call 1"]
    apart = [ask(0.11, 50, 10, f"call {i}", LOOSE, session=f"s{i}") for i in range(2)]
    assert queued(alone, *apart) == ["alone", "call 0", "call 1"]


def test_lengths_are_predicted_anew_as_answers_grow_and_not_at_every_token():
    asked = [ask(0.0, 1, 101, "r", LOOSE)]
    engine = compose(
        scheduler="preemptive",
        order=("jitserve", {"refresh": 25}),
        predictor=("constant", {"length": 60.0}),
        engine=ONE,
    )
    predictor, lengths = engine.roles.predictor, []
    predict = predictor.predict
    predictor.predict = lambda request: (lengths.append(request.num_output_tokens), predict(request))[1]
    engine.run(asked)
    assert lengths == [0, 25, 50, 75, 100]


# ---- groups ----------------------------------------------------------------------------------------------


def composed(asked: list[Arrival], **scheduler: Any) -> list[set[str]]:
    """Who is in each step; two may run at once."""
    steps = Steps()
    engine = EngineConfig(
        block_size=4, num_blocks=512, max_num_seqs=2, max_num_batched_tokens=512, check=True, max_inflight=1
    )
    run(
        asked,
        scheduler=("jitserve", {"token_budget": 512} | scheduler),
        order="jitserve",
        predictor="oracle",
        engine=engine,
        observers=[steps],
    )
    return [{q.id for q in record.plan.requests} for record in steps.records]


def test_requests_of_similar_lengths_run_together_even_if_the_very_best_is_of_another():
    """For each token of work the best is worth 11.7, and the others 10, 10.5 and 11.4."""
    asked = [ask(0.0, 11, 3, "best", LOOSE), *(ask(0.0, n, 100, f"{n}", LOOSE) for n in (200, 250, 340))]
    assert composed(asked, interval=1000)[0] == {"250", "340"}
    assert composed(asked, interval=1000, candidates=1)[0] == {"best", "340"}


def test_the_group_stays_until_the_next_choice_and_nothing_is_recomputed_then():
    asked = [ask(0.0, 100, 60, f"first {i}", LOOSE) for i in range(2)]
    asked += [ask(0.045, 100, 5, f"better {i}", LOOSE) for i in range(2)]
    for interval in (10, 25):
        steps = composed(asked, interval=interval)
        assert next(place for place, step in enumerate(steps) if "better 0" in step) == interval
        assert steps[interval] == {"better 0", "better 1"}


@dataclass
class ByName(KeyOrder):
    plugin_name = "by_name"

    def key(self, request: Request) -> str:
        return request.id


def test_an_order_that_does_not_rank_by_numbers_is_refused():
    roles, _ = build_roles(REGISTRY, default_choices(scheduler="jitserve", cache="none"))
    engine = Engine(roles | {"order": ByName(), "executor": Server()}, ONE)
    with pytest.raises(ConfigError, match="by_name ranks by 'a': choose order=jitserve, or another whose"):
        engine.run([ask(0.0, 4, 4, "a")])
