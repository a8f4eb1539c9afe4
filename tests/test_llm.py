"""`from headway import LLM`, as users of vLLM expect it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch_engines import reference_tokens, shared_prompts, variant

from headway import LLM, ConfigError, ModelError, SamplingParams

PROMPTS = shared_prompts(512)[:4]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    return LLM(str(variant("qwen3")), device="cpu", num_blocks=256, block_size=4, max_num_seqs=8)


def test_importing_headway_imports_no_torch():
    code = "import sys, headway; assert not {'torch', 'transformers', 'hydra'} & set(sys.modules); headway.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert "AttributeError: module 'headway' has no attribute 'nothing'" in done.stderr


def test_texts_and_token_ids_and_dicts(llm):
    text = "Hello, world"
    ids = llm.tokenizer.encode(text)
    answers = llm.generate([text, ids, {"prompt": text}, {"prompt_token_ids": ids}], GREEDY)
    expected = reference_tokens(variant("qwen3"), tuple(ids), 8)
    for answer in answers:
        assert answer.prompt_token_ids == ids
        assert answer.outputs[0].token_ids == expected
        assert answer.outputs[0].text == llm.tokenizer.decode(expected)
        assert answer.outputs[0].finish_reason == "length"
    assert [a.prompt for a in answers] == [text, None, text, None]


def test_one_prompt_alone(llm):
    assert len(llm.generate("Hello", GREEDY)) == len(llm.generate([1, 2, 3], GREEDY)) == 1


def test_no_prompts(llm):
    assert llm.generate([], GREEDY) == []


def test_answers_keep_the_order_of_prompts_and_their_own_parameters(llm):
    sampling = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (7, 1, 4, 2)]
    answers = llm.generate(PROMPTS, sampling)
    for prompt, parameters, answer in zip(PROMPTS, sampling, answers, strict=True):
        assert answer.outputs[0].token_ids == reference_tokens(variant("qwen3"), tuple(prompt), 8)[: parameters.max_tokens]


def test_parameters_for_too_few_prompts(llm):
    with pytest.raises(ConfigError, match="2 prompts and 1 sampling_params"):
        llm.generate([[1], [2]], [GREEDY])


def test_bad_requests_are_rejected_and_the_rest_finish(llm):
    answers = llm.generate([PROMPTS[0], "", [1, 600], [1, "x"], 3.5, [1] * 5000, PROMPTS[1]], GREEDY)
    assert [a.outputs[0].finish_reason for a in answers] == ["length", *["rejected"] * 5, "length"]
    for answer, reason in zip(answers[1:6], ("empty prompt", "vocabulary", "'x'", "3.5", "does not fit"), strict=True):
        assert reason in answer.error
    assert answers[6].outputs[0].token_ids == reference_tokens(variant("qwen3"), tuple(PROMPTS[1]), 8)
    assert answers[0].error == "" and answers[0].finished


def test_stop_token(llm):
    tokens = reference_tokens(variant("qwen3"), tuple(PROMPTS[0]), 8)
    stop = next(t for i, t in enumerate(tokens) if i >= 2 and t not in tokens[:i])
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
    output = llm.generate([PROMPTS[0]], sampling)[0].outputs[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == tokens[: tokens.index(stop) + 1]


def test_end_of_sequence_ends_unless_ignored(llm):
    free = SamplingParams(temperature=2.0, max_tokens=400, seed=1)
    ended = llm.generate([[1, 2, 3]], free)[0].outputs[0]
    assert ended.finish_reason == "stop" and ended.token_ids[-1] == 258 and 258 not in ended.token_ids[:-1]
    ignoring = llm.generate([[1, 2, 3]], SamplingParams(temperature=2.0, max_tokens=400, seed=1, ignore_eos=True))[0].outputs[0]
    assert ignoring.finish_reason == "length" and ignoring.token_ids[: len(ended.token_ids)] == ended.token_ids


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_stop_string_cuts_the_text_before_it(max_inflight):
    llm = LLM(str(variant("qwen3")), device="cpu", num_blocks=64, max_inflight=max_inflight)
    whole = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))[0].outputs[0]
    stop = whole.text[9:12]  # across token boundaries
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=("never-said", stop))
    output = llm.generate("Hello", sampling)[0].outputs[0]
    assert output.finish_reason == "stop"
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.token_ids == whole.token_ids[: len(output.token_ids)] and len(output.token_ids) < 30
    assert stop in llm.tokenizer.decode(output.token_ids) and stop not in llm.tokenizer.decode(output.token_ids[:-1])


def test_a_stop_string_in_the_prompt_does_not_stop(llm):
    output = llm.generate("Hello Hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, stop="Hello"))[0].outputs[0]
    assert len(output.token_ids) == 4


def test_logprobs(llm):
    output = llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True))[0].outputs[0]
    for token, at in zip(output.token_ids, output.logprobs, strict=True):
        assert list(at)[0] == token and at[token].rank == 1 and len(at) == 2
        assert at[token].decoded_token == llm.tokenizer.decode([token], skip_special_tokens=False)
    assert output.cumulative_logprob == pytest.approx(sum(at[t].logprob for t, at in zip(output.token_ids, output.logprobs, strict=True)))
    assert llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].logprobs is None


def test_the_prefix_cache_lives_across_calls(llm):
    prompt = list(range(100, 140))
    llm.generate([prompt], GREEDY)
    assert llm.generate([prompt], GREEDY)[0].num_cached_tokens == 36


def test_chat(llm):
    answers = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)
    assert answers[0].prompt_token_ids == llm.tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert len(llm.chat([[{"role": "user", "content": "Hi"}]] * 2, GREEDY)) == 2


def test_every_role_can_be_chosen():
    options = {"scheduler": {"name": "chunked", "token_budget": 32}, "cache": "radix", "eviction": "lfu", "order": "fcfs"}
    llm = LLM(str(variant("qwen3")), device="cpu", num_blocks=64, seed=3, **options)
    assert llm.engine.scheduler.token_budget == 32 and type(llm.engine.cache).__name__ == "RadixTree" and llm.engine.seed == 3
    assert llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids == reference_tokens(variant("qwen3"), tuple(PROMPTS[0]), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shceduler": "fcfs"}, "Did you mean scheduler"),
        ({"scheduler": "chunkd"}, "chunked"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"device": "tpu"}, "executor.device"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(str(variant("qwen3")), **options)


def test_a_model_without_tokenizer_takes_token_ids_only():
    shape = {
        "architecture": "LlamaForCausalLM", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "vocab_size": 50, "tie_word_embeddings": True, "max_position_embeddings": 64, "dtype": "float32",
    }  # fmt: skip
    llm = LLM("some/model", load_format="dummy", device="cpu", num_blocks=16, **shape)
    answer = llm.generate([[1, 2, 3]], GREEDY)[0]
    assert len(answer.outputs[0].token_ids) == 8 and answer.outputs[0].text == ""
    with pytest.raises(ModelError, match="no tokenizer"):
        llm.generate("text", GREEDY)
    assert "stop_token_ids" in llm.generate([[1]], SamplingParams(stop="x"))[0].error
