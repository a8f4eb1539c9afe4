"""A long-lived LLM: each call is a run of its own, whatever became of the one before, and nothing of it is
kept."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import pairwise

import pytest
from helpers.torch_engines import reference_tokens, variant

from headway import LLM, Arrival, Observer, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[i, 2, 3, 4, 5, 6] for i in range(4)]


class Breaks(Observer):
    """Raises in the middle of the n-th step."""

    def __init__(self, error: BaseException, step: int) -> None:
        self.error, self.left = error, step

    def on_step(self, record):
        self.left -= 1
        if self.left == 0:
            raise self.error


def small(max_inflight: int) -> LLM:
    """So few blocks that requests are preempted."""
    options = {"num_blocks": 16, "block_size": 4, "max_num_seqs": 4, "max_inflight": max_inflight}
    return LLM(str(variant("qwen3")), device="cpu", **options)


def check_fresh(llm: LLM) -> None:
    answers = llm.generate([[7, 8, 9], *PROMPTS], GREEDY)
    for prompt, answer in zip([[7, 8, 9], *PROMPTS], answers, strict=True):
        assert answer.error == "" and answer.outputs[0].token_ids == reference_tokens(
            variant("qwen3"), tuple(prompt), 8
        )


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_after_ctrl_c_the_next_call_answers_as_the_first(max_inflight):
    llm = small(max_inflight)
    for step in (1, 3, 5):
        llm.engine.observers = [Breaks(KeyboardInterrupt(), step)]
        answers = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        assert [a.outputs[0].finish_reason for a in answers] == ["aborted"] * 4
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            said = answer.outputs[0].token_ids
            assert said == reference_tokens(variant("qwen3"), tuple(prompt), 30)[: len(said)], (
                "what was said until then is kept"
            )
        llm.engine.observers = []
        check_fresh(llm)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_after_an_error_the_next_call_answers_as_the_first(max_inflight):
    llm = small(max_inflight)
    for step in (1, 4):
        llm.engine.observers = [Breaks(ValueError("mine"), step)]
        with pytest.raises(Exception, match="mine"):
            llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        llm.engine.observers = []
        check_fresh(llm)


def test_requests_of_ones_own_do_not_collide_with_those_of_calls():
    llm = small(2)
    llm.generate(PROMPTS, GREEDY)
    own = [Arrival(0.0, [7, 8, 9], GREEDY, id=id) for id in ("0", "r0", "5")]
    assert [o.state for o in llm.engine.run(own).outputs] == ["finished"] * 3
    check_fresh(llm)


def test_nothing_of_a_call_is_kept():
    llm = LLM(str(variant("qwen3")), device="cpu", num_blocks=64, block_size=4)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=20, stop="never said")

    def held(calls: int) -> int:
        for _ in range(calls):
            llm.generate([[(i * 7) % 500 for i in range(100)], "text", [600]], sampling)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    held(5)
    tracemalloc.start()
    try:
        sizes = [held(10) for _ in range(4)]
        # Free lists of libraries grow now and then; what a call keeps grows every time.
        growth = min(after - before for before, after in pairwise(sizes))
        assert growth < 10 * 300, "bytes: an answer's logprobs alone take 10,000"
    finally:
        tracemalloc.stop()
