"""KV blocks that move between tiers before a step: in order, after the steps before, for the oracle and the
real engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from helpers.scripted import ask, engine
from helpers.torch_engines import reference_tokens, shared_prompts, variant

from core.errors import InvariantError
from core.testing.oracle import OracleExecutor, WrongKV
from headway import Arrival, KVCopy, ModelConfig, SamplingParams
from plugins.executors.torch import TorchExecutor
from plugins.executors.torch.batch import StepInput
from plugins.parallel import messages

ANSWERS = {"a": 9, "b": 7, "c": 8}


class Travelling:
    """A scheduler's script. Now and then the last block of a running request goes to the other tier, and
    another block's content takes its place; a step later it comes back, before the request is planned
    again."""

    def __init__(self) -> None:
        self.away: dict[int, int] = {}  # request index -> place in the other tier
        self.moves = self.turn = 0

    def __call__(self, step, view) -> None:
        self.turn += 1
        step.wake_at(view.now)  # where all of them rest or are away
        for request in (*view.running, *view.waiting):
            if (place := self.away.pop(request.index, None)) is not None:
                step.copies.add(KVCopy(1, place, 0, request.block_table[-1]))
                step.add(request)
            elif self._may_leave(request, view):
                self.away[request.index] = request.index % 3
                self.moves += 1
                step.copies.add(KVCopy(0, request.block_table[-1], 1, request.index % 3))
                step.copies.add(KVCopy(0, request.block_table[0], 0, request.block_table[-1]))
            elif not (
                request in view.running and self.turn % 3 == request.index % 3 and len(view.running) > 1
            ):
                step.add(request)  # else it rests, so that none of its steps is in flight

    def _may_leave(self, request, view) -> bool:
        idle = request in view.running and not request.num_steps_in_flight and len(view.running) > 1
        return idle and request.num_computed_tokens % 4 > 0 and self.turn % 3 == (request.index + 1) % 3


def answers(executor: OracleExecutor, **limits) -> tuple[dict[str, list[int]], Travelling]:
    script = Travelling()
    running = engine(script, executor=executor, **limits)
    result = running.run([ask(6 + i, n, id=id) for i, (id, n) in enumerate(ANSWERS.items())])
    return {o.id: o.output_token_ids for o in result.outputs}, script


def oracle(kind: type[OracleExecutor] = OracleExecutor) -> OracleExecutor:
    return kind(num_blocks=16, tier_blocks=(3,))


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_blocks_travel_between_steps(max_inflight: int) -> None:
    tokens, script = answers(oracle(), max_inflight=max_inflight)
    assert script.moves > 1 and {id: len(given) for id, given in tokens.items()} == ANSWERS


def changed(change: Callable[[list[KVCopy]], list[KVCopy]], late: bool = False) -> type[OracleExecutor]:
    """An executor that does something else with the copies of a plan."""

    class Changed(OracleExecutor):
        def launch(self, plan):
            ticket = super().launch(replace(plan, copies=[] if late else change(list(plan.copies))))
            for copy in plan.copies if late else ():
                self._copy(plan, copy)
            return ticket

    return Changed


@pytest.mark.parametrize(
    "kind",
    [
        changed(lambda copies: [c for c in copies if not c.source_tier]),
        changed(lambda copies: [c for c in copies if not c.target_tier]),
        changed(lambda copies: copies[::-1]),
        changed(lambda copies: copies, late=True),
    ],
    ids=["nothing comes back", "nothing leaves", "the wrong way round", "after the step"],
)
def test_an_executor_that_copies_wrongly_is_found(kind: type[OracleExecutor]) -> None:
    with pytest.raises(WrongKV):
        answers(oracle(kind))


def test_what_a_step_in_flight_uses_is_not_written_over() -> None:
    def script(step, view) -> None:
        for request in (*view.running, *view.waiting):
            if request.num_steps_in_flight:
                step.copies.add(KVCopy(0, request.block_table[0], 0, request.block_table[-1]))
            step.add(request)

    with pytest.raises(WrongKV, match="in flight uses"):
        engine(script, executor=oracle(), max_inflight=2).run([ask(6, 5)])


@pytest.mark.parametrize(
    ("copy", "says"),
    [
        (KVCopy(0, 0, 1, 3), "block 3 of tier 1"),
        (KVCopy(2, 0, 0, 0), "block 0 of tier 2"),
        (KVCopy(0, -1, 1, 0), "block -1 of tier 0"),
        (KVCopy(0, 15, 1, 0), "reads a block of the pool that is free"),
        (KVCopy(1, 0, 0, 15), "which is free, cached or held by others"),
        (KVCopy(1, 0, 0, 0), "cached"),
    ],
)
def test_a_copy_that_cannot_be_is_refused(copy: KVCopy, says: str) -> None:
    def script(step, view) -> None:
        for request in (*view.running, *view.waiting):
            step.add(request)
        if view.step == 1:
            step.copies.add(copy)

    with pytest.raises(InvariantError, match=says):
        engine(script, executor=oracle()).run([ask(6, 5)])


def test_copies_wait_for_a_step_that_runs() -> None:
    """A plan in which nothing runs is not launched."""
    script = Travelling()
    running = engine(script, executor=oracle())
    running.builder.copies._asked.append("a copy")  # type: ignore[arg-type]
    running.builder.begin(0, 0.0, 8, 8)
    assert running.builder.build([]).copies == () and running.builder.copies.take() == ["a copy"]


# ---- the real engine -------------------------------------------------------------------------------------


def real(
    max_inflight: int, drop: Callable[[KVCopy], bool] = lambda copy: False
) -> tuple[list[list[int]], list[list[int]]]:
    """(what came out, what transformers answers) while blocks travel; copies that are to be dropped are not
    made."""
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01, host_blocks=3)
    executor.prepare(ModelConfig(name_or_path=str(variant("qwen3"))))
    assert executor.caps.tier_blocks == (3,)
    launch, script = executor.launch, Travelling()
    executor.launch = lambda plan: launch(replace(plan, copies=[c for c in plan.copies if not drop(c)]))  # type: ignore[method-assign]
    running = engine(script, executor=executor, max_inflight=max_inflight)
    prompts = shared_prompts(512)[1:4]
    arrivals = [
        Arrival(0.0, p[:9], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)) for p in prompts
    ]
    result = running.run(arrivals)
    assert script.moves > 1
    expected = [reference_tokens(variant("qwen3"), tuple(a.prompt_token_ids), 9) for a in arrivals]
    return [o.output_token_ids for o in result.outputs], expected


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_the_real_engine_s_blocks_travel(max_inflight: int) -> None:
    found, expected = real(max_inflight)
    assert found == expected


def test_the_real_engine_needs_them_back() -> None:
    """Else the test above could not fail."""
    found, expected = real(1, drop=lambda copy: copy.source_tier == 1)
    assert found != expected


def test_copies_reach_the_other_ranks() -> None:
    """They are the end of the buffer that the driver sends; the step itself is as without them."""
    step = StepInput(
        np.arange(20, dtype=np.int32), True, False, 4, 4, 4, 2, 0, 1, 9, 0, -1, None, num_copies=2
    )
    sent = messages.unpack_step(messages.pack_step(step))
    alone, copies = sent.without_copies()
    assert (
        copies == [[12, 13, 14, 15], [16, 17, 18, 19]]
        and alone.num_copies == 0
        and alone.data.tolist() == list(range(12))
    )
