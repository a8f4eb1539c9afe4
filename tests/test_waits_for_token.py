"""A request that needs its last token on the host is planned one token at a time, whatever runs ahead beside
it."""

from __future__ import annotations

import pytest
from helpers.scripted import ask, engine, everybody
from helpers.torch_engines import engine_of, prepared, reference_tokens, shared_prompts, variant

from core.compose.config import EngineConfig
from core.compose.hooks import load_registry
from core.engine import Engine
from core.inputs import Arrival, SamplingParams
from core.plan import StepPlan
from core.testing.oracle import OracleExecutor, sampled_token
from core.testing.subject import Subject

REGISTRY = load_registry()


class Masking(OracleExecutor):
    """Makes a mask of a request's last token before it samples the next: the token must be there."""

    masks = ahead = 0

    def launch(self, plan: StepPlan):
        for request, start, length, sample, _ in plan.chunks:
            if sample and request.sampling.waits_for_token:
                assert len(request.token_ids) == start + length, f"{request}: its last token is on the device"
                self.masks += 1
            self.ahead += len(request.token_ids) < start + length
        return super().launch(plan)


def arrivals(num: int = 6, every: int = 2) -> list[Arrival]:
    return [
        Arrival(
            0.01 * i,
            ask(3 + i).prompt_token_ids,
            SamplingParams(max_tokens=4 + i, waits_for_token=i % every == 0),
            id=f"r{i}",
        )
        for i in range(num)
    ]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("scheduler", REGISTRY.names("scheduler"))
def test_its_last_token_is_there_under_every_scheduler(scheduler: str, depth: int) -> None:
    executor = Masking(num_blocks=14)
    roles = {
        **Subject((f"scheduler={scheduler}", "order=priority", "cache=hash")).plain_roles(),
        "executor": executor,
    }
    limits = EngineConfig(
        block_size=4, num_blocks=14, max_num_seqs=4, max_num_batched_tokens=32, max_inflight=depth, check=True
    )
    outputs = Engine(roles, limits).run(arrivals()).outputs
    assert [len(o.output_token_ids) for o in outputs] == [4 + i for i in range(6)]
    assert executor.masks >= 4 + 6 + 8
    assert (executor.ahead > 0) == (depth > 1)  # the others are planned ahead of their tokens


def test_alone_it_takes_a_plan_at_a_time() -> None:
    executor = Masking(num_blocks=16)
    output = engine(everybody, executor=executor, max_inflight=2).run(arrivals(1)).outputs[0]
    assert output.output_token_ids == [sampled_token(0, "r0", 3 + i, 5) for i in range(4)]
    assert executor.ahead == 0


def test_a_planner_that_runs_ahead_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could not fail."""
    from core.request import Request

    made = Request.__init__

    def forgets(request, *args, **options) -> None:
        made(request, *args, **options)
        request.waits_for_token = False

    monkeypatch.setattr(Request, "__init__", forgets)
    with pytest.raises(Exception, match="its last token is on the device"):
        engine(everybody, executor=Masking(num_blocks=16), max_inflight=2).run(arrivals(1))


def test_the_real_engine_answers_alike() -> None:
    directory = variant("qwen3")
    sampling = [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, waits_for_token=wait)
        for wait in (True, False)
    ]
    prompts = shared_prompts(512)[:4]
    running = engine_of(prepared(directory), max_inflight=2)
    result = running.run([Arrival(0.0, p, sampling[i % 2], id=f"p{i}") for i, p in enumerate(prompts)])
    assert [o.output_token_ids for o in result.outputs] == [
        reference_tokens(directory, tuple(p), 6) for p in prompts
    ]
