"""The real engine tells policies how long a step will take: its card's roofline, corrected by its own
steps."""

from __future__ import annotations

import json

import pytest
from helpers.policy_runs import compose
from helpers.torch_engines import engine_of, generate, prepared, shared_prompts, variant
from hypothesis import given
from hypothesis import strategies as st

from core.compose.config import EngineConfig, Hardware, ModelShape
from core.inputs import SLO, Arrival, SamplingParams
from plugins.executors.cost import Fitted, Roofline, restored, stored

SHAPE = ModelShape("LlamaForCausalLM", 64, 4, 8, 4, 8, 128, 100, True, 512)
DECODES, PROMPT = ([40, 90], [1, 1]), ([0, 90], [300, 1])
steps = st.lists(st.tuples(st.sampled_from([DECODES, PROMPT]), st.floats(1e-4, 1.0)), max_size=40)


def fitted() -> Fitted:
    return Fitted(Roofline(SHAPE, Hardware()))


def test_before_the_first_step_it_is_the_roofline():
    for chunks in (DECODES, PROMPT):
        assert fitted().step_time(*chunks) == Roofline(SHAPE, Hardware()).step_time(*chunks)


def test_steps_of_decodes_and_steps_with_prompts_are_corrected_apart():
    cost, roofline = fitted(), Roofline(SHAPE, Hardware())
    for _ in range(3):
        cost.observe(*DECODES, 5 * roofline.step_time(*DECODES))
        cost.observe(*PROMPT, 2 * roofline.step_time(*PROMPT))
    assert cost.step_time([7], [1]) == pytest.approx(5 * roofline.step_time([7], [1]))
    assert cost.step_time([0], [90]) == pytest.approx(2 * roofline.step_time([0], [90]))
    assert (
        str(cost) == "roofline of h200, tp=1 pp=1, x 5.00 in steps of decodes, x 2.00 in steps with prompts"
    )


def test_one_slow_step_counts_for_nothing_and_a_change_that_lasts_is_followed():
    cost, roofline = fitted(), Roofline(SHAPE, Hardware())
    usual = roofline.step_time(*DECODES)
    for factor in (3, 3, 900, 3):
        cost.observe(*DECODES, factor * usual)
    assert cost.step_time(*DECODES) == pytest.approx(3 * usual)
    for _ in range(Fitted.STEPS):
        cost.observe(*DECODES, 7 * usual)
    assert cost.step_time(*DECODES) == pytest.approx(7 * usual)


def test_a_step_that_nobody_asks_about_costs_no_roofline(monkeypatch):
    cost = fitted()
    monkeypatch.setattr(cost.roofline, "step_time", lambda *_: pytest.fail("worked out though nobody asked"))
    for chunks in (DECODES, PROMPT):
        cost.observe(*chunks, 0.1)


@given(steps)
def test_the_same_steps_give_the_same_predictions_after_a_round_trip(seen):
    first = fitted()
    again = restored(SHAPE, json.loads(json.dumps(stored(first))))
    for cost in (first, again):
        for chunks, seconds in seen:
            cost.observe(*chunks, seconds)
    assert first.step_time(*DECODES) == again.step_time(*DECODES) and str(first) == str(again)


def test_the_torch_engine_learns_from_its_steps_and_results_say_so():
    executor = prepared(variant("qwen3"))
    engine = engine_of(executor, num_blocks=64)
    roofline = str(executor.cost_model.roofline)
    assert executor.step_time_basis == roofline
    generate(engine, shared_prompts(512)[:3])
    assert engine.result().step_time_basis.startswith(f"{roofline}, x ")
    predicted = executor.cost_model.step_time([20, 20], [1, 1])
    assert predicted > executor.cost_model.roofline.step_time([20, 20], [1, 1])  # no CPU is an H200


@pytest.mark.parametrize(
    "choices",
    [
        {"chunk": "dynamic_chunk"},
        {"admission": "early_reject"},
        {"order": "least_slack", "predictor": "oracle"},
        {"scheduler": "preemptive", "order": "mlfq"},
        {"scheduler": "selective", "order": "niyama", "chunk": "dynamic_chunk"},
        {"scheduler": "fairbatching", "order": "edf"},
    ],
    ids=str,
)
def test_policies_that_ask_for_step_times_run_on_the_real_engine(choices):
    """And the tokens are what they are without them."""
    prompts, greedy = shared_prompts(512)[:6], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    asked = [Arrival(0.0, prompt, greedy, slo=SLO(ttft=1e6, tpot=1e3)) for prompt in prompts]
    limits = EngineConfig(block_size=4, num_blocks=200, max_num_seqs=3, max_num_batched_tokens=32)

    def answers(**choices):
        result = compose(server=prepared(variant("qwen3")), engine=limits, **choices).run(asked)
        assert {o.state for o in result.outputs} == {"finished"}
        return [o.output_token_ids for o in result.outputs], result.step_time_basis

    tokens, basis = answers(**choices)
    assert tokens == answers()[0] and "roofline" in basis
