"""A request goes on in another engine, with its tokens and its KV: detach, attach, and what is cached of it
there."""

from __future__ import annotations

from random import Random

import pytest
from helpers.policy_runs import Server
from helpers.scripted import ask, engine, everybody
from helpers.torch_engines import CACHES, engine_of, prepared, reference_tokens, shared_prompts, variant

from core.compose.config import EngineConfig
from core.compose.hooks import load_registry
from core.engine import Engine
from core.errors import ConfigError, WorkloadError
from core.executor import Executor
from core.handoff import Handoff
from core.inputs import Arrival, SamplingParams
from core.policy import Order
from core.request import RequestState
from core.testing.oracle import OracleExecutor, WrongKV, sampled_token
from core.testing.subject import Subject
from core.testing.trial import PoolCheck

REGISTRY = load_registry()


def composed(
    scheduler: str = "chunked",
    cache: str = "hash",
    num_blocks: int = 16,
    depth: int = 1,
    executor: Executor | None = None,
) -> Engine:
    roles = Subject((f"scheduler={scheduler}", "order=priority", f"cache={cache}")).plain_roles()
    roles["executor"] = executor or OracleExecutor(num_blocks=num_blocks)
    limits = EngineConfig(
        block_size=4,
        num_blocks=num_blocks,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_inflight=depth,
        check=True,
    )
    made = Engine(roles, limits)
    made.observers.append(PoolCheck(made))
    return made


def answer(id: str, prompt: int, count: int) -> list[int]:
    return [sampled_token(0, id, prompt + i, 5) for i in range(count)]


def move(source: Engine, target: Engine, id: str) -> Handoff:
    handoff = source.detach(id)
    assert handoff is not None
    target.attach(handoff)
    return handoff


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("cache", REGISTRY.names("cache"))
@pytest.mark.parametrize("scheduler", REGISTRY.names("scheduler"))
def test_every_scheduler_and_cache_hands_requests_over(scheduler: str, cache: str, depth: int) -> None:
    """Requests change sides by chance, back and forth, until all have ended; pools are tight, KV is checked
    on both sides."""
    chance = Random(f"{scheduler}/{cache}/{depth}")
    sides = [composed(scheduler, cache, 14, depth), composed(scheduler, cache, 14, depth)]
    lengths = {f"r{i}": (3 + i, 12 + i % 4) for i in range(8)}
    for i, (id, (prompt, count)) in enumerate(lengths.items()):
        sides[i % 2].add(ask(prompt, count, id=id))
    moves = 0
    while sum(side.step() for side in sides):
        source = chance.choice((0, 1))
        present = sorted(sides[source].roster.present)
        if present and chance.random() < 0.8 and moves < 60:
            moves += (handoff := sides[source].detach(chance.choice(present))) is not None
            if handoff is not None:
                sides[1 - source].attach(handoff)
    outputs = [o for side in sides for o in side.result().outputs]
    assert moves > 5 and sorted(o.id for o in outputs) == sorted(lengths)
    for o in outputs:
        prompt, count = lengths[o.id]
        assert o.output_token_ids == answer(o.id, prompt, count) and o.state == "finished"
        assert len(o.token_times) == count
    for side in sides:
        side.pool.check()
        assert side.pool.num_used == 0 and not side.roster.present and not side.roster.releasing


def half_way(engine: Engine, arrival: Arrival, tokens: int) -> Engine:
    """Until it has so many tokens of its answer."""
    engine.add(arrival)
    while not (request := engine.roster.present.get(arrival.id)) or request.num_output_tokens < tokens:
        engine.step()
    return engine


def test_what_it_had_goes_along() -> None:
    source, target = half_way(composed(), ask(6, 9, id="x"), 4), composed()
    handoff = move(source, target, "x")
    # 9 tokens are computed, 8 in full blocks
    assert (handoff.num_blocks, handoff.token_ids[6:]) == (2, answer("x", 6, 4))
    assert not source.roster.present and source.pool.num_used == 0 and source.pool.num_cached == 2
    result = target.run([])
    assert [o.output_token_ids for o in result.outputs] == [answer("x", 6, 9)]
    assert (
        result.outputs[0].token_times[:4] == handoff.token_times and result.outputs[0].num_cached_tokens == 0
    )
    # the one behind the last full block, and each new token but the last
    assert result.planned_tokens == (9 - 8) + 5
    assert source.result().outputs == []


def test_kv_that_arrived_is_in_the_index_before_a_step_is_made() -> None:
    source, target = half_way(composed(), ask(9, 3, id="x"), 1), composed()
    move(source, target, "x")
    assert target.pool.num_cached == 2 and target.counts.num_steps == 0
    hit = target.run([ask(9, 2, id="y")])
    assert {o.id: o.num_cached_tokens for o in hit.outputs} == {"x": 0, "y": 8}


def test_what_is_cached_there_already_is_not_written_again() -> None:
    source, target = half_way(composed(), ask(9, 3, id="x"), 1), composed()
    target.run([ask(9, 2, id="y")])
    written = []
    write = target.executor.write_blocks
    target.executor.write_blocks = lambda blocks, content, first: (
        written.append(first) or write(blocks, content, first)
    )
    move(source, target, "x")
    assert written == [] and target.pool.num_cached == 2
    assert {o.id: o.output_token_ids for o in target.run([]).outputs}["x"] == answer("x", 9, 3)


def test_what_does_not_fit_is_computed_again() -> None:
    source, target = (
        half_way(composed(), ask([2] * 14, 6, id="x"), 2),
        half_way(composed(num_blocks=6), ask(13, 9, id="y"), 1),
    )
    handoff = move(source, target, "x")
    request = target.roster.present["x"]
    assert handoff.num_blocks == 3 and len(request.block_table) < 3
    result = target.run([])
    assert {o.id: o.output_token_ids for o in result.outputs} == {
        "x": answer("x", 14, 6),
        "y": answer("y", 13, 9),
    }


def test_a_request_that_only_waits_goes_as_it_came() -> None:
    source, target = half_way(composed(), ask(6, 9, id="x"), 1), composed()
    for i in range(5):
        source.add(ask(6, 2, id=f"w{i}"))
    source.step()
    waiting = source.waiting.items[-1]
    handoff = move(source, target, waiting.id)
    assert (handoff.kv, handoff.num_blocks, handoff.first_scheduled_time) == (None, 0, -1.0)
    assert target.roster.present[waiting.id].state is RequestState.WAITING
    assert target.run([]).outputs[0].output_token_ids == answer(waiting.id, 6, 2)


def test_an_emulated_end_goes_along() -> None:
    arrival = Arrival(0.0, [1, 2, 3], SamplingParams(max_tokens=40), 5, "x")
    source, target = half_way(composed(), arrival, 2), composed()
    move(source, target, "x")
    assert len(target.run([]).outputs[0].output_token_ids) == 5 and not source.roster.hidden_ends


class Ends(Order):
    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def order(self, view):
        return view.waiting

    def on_arrival(self, request, now):
        self.heard.append((request.id, "arrives"))

    def on_finish(self, request, now):
        self.heard.append((request.id, request.state.value))


def test_the_roles_hear_of_it() -> None:
    orders = [Ends(), Ends()]
    source, target = (engine(everybody, roles={"order": order}) for order in orders)
    move(half_way(source, ask(6, 9, id="x"), 2), target, "x")
    target.run([])
    assert orders[0].heard == [("x", "arrives"), ("x", "detached")] and orders[1].heard == [
        ("x", "arrives"),
        ("x", "finished"),
    ]


def test_one_that_is_not_there_is_none_and_one_that_ends_meanwhile_too() -> None:
    source = half_way(composed(depth=2), ask(6, 3, id="x"), 2)
    assert source.detach("y") is None
    assert source.detach("x") is None  # its last step is in flight, and brings its last token
    assert source.result().outputs[0].output_token_ids == answer("x", 6, 3)


def test_what_cannot_go_on_there_is_refused_and_stays_with_the_caller() -> None:
    handoff = half_way(composed(), ask(14, 9, id="x"), 2).detach("x")
    with pytest.raises(ConfigError, match="KV blocks of 4 tokens cannot become blocks of 2"):
        engine(everybody, block_size=2).attach(handoff)
    with pytest.raises(WorkloadError, match="needs up to 6 KV blocks"):
        composed(num_blocks=4).attach(handoff)
    target = composed()
    target.attach(handoff)
    with pytest.raises(WorkloadError, match="id 'x' is taken"):
        target.attach(handoff)


def test_an_executor_that_cannot_move_kv_says_so() -> None:
    source = Engine(
        {**Subject().plain_roles(), "executor": Server()}, EngineConfig(block_size=4, num_blocks=16)
    )
    with pytest.raises(ConfigError, match="cannot hand KV to another engine"):
        half_way(source, ask(6, 9, id="x"), 2).detach("x")


class Forgetful(OracleExecutor):
    """Writes nothing of what arrives, or it elsewhere."""

    shift = 0

    def write_blocks(self, blocks, content, first):
        if self.shift:
            super().write_blocks(blocks, content, first + self.shift)


@pytest.mark.parametrize("shift", [0, 1])
def test_kv_that_did_not_arrive_is_found(shift: int) -> None:
    executor = Forgetful(num_blocks=16)
    executor.shift = shift
    target = composed(executor=executor)
    move(half_way(composed(), ask(14, 9, id="x"), 2), target, "x")
    with pytest.raises(WrongKV):
        target.run([])


@pytest.mark.parametrize("cache", list(CACHES))
def test_the_real_engine_hands_requests_over(cache: str) -> None:
    directory = variant("qwen3")
    prompts = shared_prompts(512)[:5]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first, second = engine_of(prepared(directory), cache=cache, max_inflight=2), None
    for i, prompt in enumerate(prompts):
        first.add(Arrival(0.0, prompt, sampling, id=f"p{i}"))
    while len(first.roster.present) < 5 or any(
        r.num_output_tokens < 3 for r in first.roster.present.values()
    ):
        first.step()
    moved = [first.detach(f"p{i}") for i in range(5)]
    second = engine_of(prepared(directory), cache=cache)  # the same weights, and a new KV cache
    for handoff in moved:
        second.attach(handoff)
    outputs = {o.id: o.output_token_ids for o in second.run([]).outputs}
    assert outputs == {f"p{i}": reference_tokens(directory, tuple(p), 8) for i, p in enumerate(prompts)}
    assert second.counts.planned_tokens < sum(map(len, prompts))  # no prompt was computed again
