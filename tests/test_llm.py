"""`from headway import LLM`, as users of vLLM expect it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tokenizers_made import metaspace
from helpers.torch_engines import reference_tokens, shared_prompts, variant

from headway import LLM, ConfigError, ModelError, SamplingParams
from plugins.models.tiny import LLAMA, write_checkpoint

PROMPTS = shared_prompts(512)[:4]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    return LLM(str(variant("qwen3")), device="cpu", num_blocks=256, block_size=4, max_num_seqs=8)


def test_importing_headway_imports_no_torch():
    code = (
        "import sys, headway; assert not {'torch', 'transformers', 'hydra'} & set(sys.modules); "
        "headway.nothing"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
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
        assert (
            answer.outputs[0].token_ids
            == reference_tokens(variant("qwen3"), tuple(prompt), 8)[: parameters.max_tokens]
        )


def test_parameters_for_too_few_prompts(llm):
    with pytest.raises(ConfigError, match="2 prompts and 1 sampling_params"):
        llm.generate([[1], [2]], [GREEDY])


def test_bad_requests_are_rejected_and_the_rest_finish(llm):
    answers = llm.generate([PROMPTS[0], "", [1, 600], [1, "x"], 3.5, [1] * 5000, PROMPTS[1]], GREEDY)
    assert [a.outputs[0].finish_reason for a in answers] == ["length", *["rejected"] * 5, "length"]
    for answer, reason in zip(
        answers[1:6], ("empty prompt", "vocabulary", "'x'", "3.5", "does not fit"), strict=True
    ):
        assert reason in answer.error
    assert answers[6].outputs[0].token_ids == reference_tokens(variant("qwen3"), tuple(PROMPTS[1]), 8)
    assert answers[0].error == "" and answers[0].finished


FORMS = {
    "an array": lambda ids: np.array(ids),
    "a list with an array": lambda ids: [np.array(ids, dtype=np.int32)],
    "an array of one row": lambda ids: np.array([ids]),
    "a tensor": lambda ids: torch.tensor(ids),
    "a list of array elements": lambda ids: list(np.array(ids)),
    "a tuple": tuple,
    "a dict with an array": lambda ids: {"prompt_token_ids": np.array(ids)},
    "a dict with a text besides": lambda ids: {"prompt_token_ids": ids, "prompt": "text", "cache_salt": None},
    "a generator of prompts": lambda ids: (prompt for prompt in [ids]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_one_prompt(llm, form):
    (answer,) = llm.generate(form(PROMPTS[0]), GREEDY)
    assert answer.outputs[0].token_ids == reference_tokens(variant("qwen3"), tuple(PROMPTS[0]), 8)
    assert answer.prompt_token_ids == PROMPTS[0] and set(map(type, answer.prompt_token_ids)) == {int}


BAD_PROMPTS = {
    "half a character": ("ok \ud83d", "half of a surrogate pair"),
    "none": (None, "prompt is None"),
    "bytes": (b"abc", "prompt is b'abc'"),
    "a view of bytes": (memoryview(b"abc"), "prompt is b'abc'"),
    "a scalar array": (np.array(5), "prompt is 5"),
    "megabytes of bytes": (bytes(1 << 24), "prompt is b'"),
    "a set": ({1, 2}, "expected a list of token ids"),
    "a number": (7.5, "7.5"),
    "floats": ([1.0, 2.0], "prompt holds 1.0"),
    "an array of floats": (np.array([1.0]), "prompt holds 1.0"),
    "bools": ([True], "prompt holds True"),
    "lists within": ([[1, 2], [3]], "prompt holds [1, 2]"),
    "nothing": ([], "empty prompt"),
    "no text": ("", "empty prompt"),
    "negative ids": ([-1, 5], "token id -1"),
    "an id beyond the vocabulary": ([512], "token id 512"),
    "an id beyond 64 bits": ([10**20], "outside the vocabulary"),
    "an unknown key": ({"text": "hi"}, "no 'text': expected prompt, prompt_token_ids"),
    "an empty dict": ({}, "needs prompt or prompt_token_ids"),
    "a dict of None": ({"prompt": None}, "needs prompt or prompt_token_ids"),
    "a text that is none": ({"prompt": 5}, "expected texts"),
    "too long": ([1] * 5000, "does not fit"),
    "a range beyond all memory": (range(10**13), "does not fit"),
    "far too long": (
        "word " * 2_000_000,
        "prompt of 10,000,000 characters does not fit the context of 4,096",
    ),
}


@pytest.mark.parametrize(("prompt", "reason"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_bad_prompt_is_rejected_and_the_next_one_answered(llm, prompt, reason):
    bad, good = llm.generate([prompt, PROMPTS[0]], GREEDY)
    assert bad.outputs[0].finish_reason == "rejected" and reason in bad.error
    assert good.error == "" and good.outputs[0].token_ids == reference_tokens(
        variant("qwen3"), tuple(PROMPTS[0]), 8
    )
    assert bad.request_id != good.request_id


def test_an_array_of_texts(llm):
    answers = llm.generate(np.array(["Hello", "world"]), GREEDY)
    assert [a.prompt_token_ids for a in answers] == [
        llm.tokenizer.encode(text) for text in ("Hello", "world")
    ]


@pytest.mark.parametrize("prompt", [None, b"abc", 7, 7.5, np.array(5)], ids=repr)
def test_a_bad_prompt_alone(llm, prompt):
    (answer,) = llm.generate(prompt, GREEDY)
    assert answer.outputs[0].finish_reason == "rejected" and answer.error


def test_bad_parameters_of_one_prompt_do_not_touch_the_others(llm):
    many = SamplingParams(temperature=0, max_tokens=2, logprobs=513)
    answers = llm.generate([PROMPTS[0]] * 4, [many, {"temperature": 0}, None, GREEDY])
    assert [a.outputs[0].finish_reason for a in answers] == ["rejected", "rejected", "length", "length"]
    assert (
        "logprobs=513: the vocabulary has 512 tokens" in answers[0].error
        and "expected SamplingParams" in answers[1].error
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0}, "greedy", 0], ids=repr)
def test_parameters_that_are_none(llm, sampling):
    with pytest.raises(ConfigError, match="expected SamplingParams"):
        llm.generate([PROMPTS[0]], sampling)


def test_stop_token(llm):
    tokens = reference_tokens(variant("qwen3"), tuple(PROMPTS[0]), 8)
    stop = next(t for i, t in enumerate(tokens) if i >= 2 and t not in tokens[:i])
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
    output = llm.generate([PROMPTS[0]], sampling)[0].outputs[0]
    assert output.finish_reason == "stop" and output.stop_reason == stop
    assert output.token_ids == tokens[: tokens.index(stop) + 1]
    assert output.text == llm.tokenizer.continuation(PROMPTS[0] + output.token_ids[:-1], len(PROMPTS[0])), (
        "its text is no answer"
    )


def test_end_of_sequence_ends_unless_ignored(llm):
    free = SamplingParams(temperature=2.0, max_tokens=400, seed=1)
    ended = llm.generate([[1, 2, 3]], free)[0].outputs[0]
    assert ended.stop_reason is None, "as in vLLM"
    assert ended.finish_reason == "stop" and ended.token_ids[-1] == 258 and 258 not in ended.token_ids[:-1]
    ignoring = llm.generate(
        [[1, 2, 3]], SamplingParams(temperature=2.0, max_tokens=400, seed=1, ignore_eos=True)
    )[0].outputs[0]
    assert (
        ignoring.finish_reason == "length" and ignoring.token_ids[: len(ended.token_ids)] == ended.token_ids
    )


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_stop_string_cuts_the_text_before_it(max_inflight):
    llm = LLM(str(variant("qwen3")), device="cpu", num_blocks=64, max_inflight=max_inflight)
    whole = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))[0].outputs[0]
    stop = whole.text[9:12]  # across token boundaries
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=("never-said", stop))
    output = llm.generate("Hello", sampling)[0].outputs[0]
    assert output.finish_reason == "stop" and output.stop_reason == stop
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.token_ids == whole.token_ids[: len(output.token_ids)] and len(output.token_ids) < 30
    assert stop in llm.tokenizer.decode(output.token_ids) and stop not in llm.tokenizer.decode(
        output.token_ids[:-1]
    )


@pytest.mark.parametrize("number", [5, 8, 12])
def test_a_stop_string_that_the_last_allowed_token_completes(llm, number):
    whole = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0].outputs[0]
    before, after = (llm.tokenizer.decode(whole.token_ids[:count]) for count in (number - 1, number))
    stop = after[len(before) - 1 :]
    assert stop in after and stop not in before
    for limit in (number, number + 1):
        output = llm.generate(
            "Hello", SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True, stop=stop)
        )[0].outputs[0]
        assert (output.finish_reason, output.text, len(output.token_ids)) == (
            "stop",
            after[: after.index(stop)],
            number,
        )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint whose tokenizer has blanks as sentencepiece has them."""
    directory = tmp_path_factory.mktemp("llama") / "m"
    write_checkpoint(directory, LLAMA)
    (directory / "tokenizer_config.json").unlink()
    return LLM(metaspace(directory), device="cpu", num_blocks=64, block_size=4)


def test_an_answer_begins_as_it_continues_the_prompt(llama):
    tokenizer, greedy = (
        llama.tokenizer,
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0),
    )
    blank = next(
        [t]
        for t in range(262, 342)
        if tokenizer.piece(llama.generate([[t]], greedy)[0].outputs[0].token_ids[0]).startswith(" ")
    )
    output = llama.generate([blank], greedy)[0].outputs[0]
    whole = tokenizer.decode([*blank, *output.token_ids])
    assert output.text == whole[len(tokenizer.decode(blank)) :] and output.text[0] == " "
    assert (
        output.logprobs[0][output.token_ids[0]].decoded_token
        == output.text[: len(tokenizer.piece(output.token_ids[0]))]
    )
    first = output.text[:2]
    stopped = llama.generate(
        [blank], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop=first)
    )[0].outputs[0]
    assert (stopped.finish_reason, stopped.text, stopped.stop_reason) == ("stop", "", first)


def test_a_stop_string_in_the_prompt_does_not_stop(llm):
    output = llm.generate(
        "Hello Hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, stop="Hello")
    )[0].outputs[0]
    assert len(output.token_ids) == 4


def test_logprobs(llm):
    output = llm.generate(
        [PROMPTS[0]], SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True)
    )[0].outputs[0]
    for token, at in zip(output.token_ids, output.logprobs, strict=True):
        assert list(at)[0] == token and at[token].rank == 1 and len(at) == 2
        assert at[token].decoded_token == llm.tokenizer.decode([token], skip_special_tokens=False)
    assert output.cumulative_logprob == pytest.approx(
        sum(at[t].logprob for t, at in zip(output.token_ids, output.logprobs, strict=True))
    )
    assert llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].logprobs is None


def test_the_prefix_cache_lives_across_calls(llm):
    prompt = list(range(100, 140))
    llm.generate([prompt], GREEDY)
    assert llm.generate([prompt], GREEDY)[0].num_cached_tokens == 36


def test_chat(llm):
    answers = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)
    assert answers[0].prompt_token_ids == llm.tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert len(llm.chat([[{"role": "user", "content": "Hi"}]] * 2, GREEDY)) == 2


def test_chat_passes_what_the_template_wants(llm):
    template = (
        "{{ messages[0].content }}{{ tools | length }}{{ documents[0].title }}{{ mood }}{{ "
        "add_generation_prompt }}"
    )
    options = {
        "tools": [{}, {}],
        "documents": [{"title": "T"}],
        "chat_template_kwargs": {"mood": "gay"},
        "add_generation_prompt": False,
    }
    (answer,) = llm.chat([{"role": "user", "content": "Hi"}], GREEDY, chat_template=template, **options)
    assert llm.tokenizer.decode(answer.prompt_token_ids) == "Hi2TgayFalse"


BAD_CHATS = {
    "empty": ([], "empty"),
    "a text": ("Hi", "expected a list of"),
    "no message": ([5], "expected an object with role and content"),
    "half a character": ([{"role": "user", "content": "\ud83d"}], "half of a surrogate pair"),
    "itself": ((lambda m: m.append({"role": "user", "content": m}) or m)([]), "contain themselves"),
}


@pytest.mark.parametrize(("conversation", "reason"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_conversation_is_rejected_and_the_next_one_answered(llm, conversation, reason):
    bad, good = llm.chat([conversation, [{"role": "user", "content": "Hi"}]], GREEDY)
    assert bad.outputs[0].finish_reason == "rejected" and reason in bad.error
    assert len(good.outputs[0].token_ids) == 8


def test_a_template_that_refuses_one_conversation(llm):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ "
        "messages[0].content }}"
    )
    chats = [[{"role": role, "content": "Hi"}] for role in ("system", "user")]
    bad, good = llm.chat(chats, GREEDY, chat_template=template)
    assert "refuses these messages: no system" in bad.error and good.error == ""


def test_a_closed_llm_says_so():
    llm = LLM(str(variant("qwen3")), device="cpu", num_blocks=16)
    llm.close()
    llm.close()
    with pytest.raises(ConfigError, match="this LLM is closed"):
        llm.generate([[1]], GREEDY)
    with pytest.raises(ConfigError, match="this LLM is closed"):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY)


def test_every_role_can_be_chosen():
    options = {
        "scheduler": {"name": "chunked", "token_budget": 32},
        "cache": "radix",
        "eviction": "lfu",
        "order": "fcfs",
    }
    llm = LLM(str(variant("qwen3")), device="cpu", num_blocks=64, seed=3, **options)
    assert (
        llm.engine.roles.scheduler.token_budget == 32
        and type(llm.engine.roles.cache).__name__ == "RadixTree"
        and llm.engine.seed == 3
    )
    assert llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids == reference_tokens(
        variant("qwen3"), tuple(PROMPTS[0]), 8
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shceduler": "fcfs"}, "Did you mean scheduler"),
        ({"scheduler": "chunkd"}, "chunked"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"device": "tpu"}, "executor.device"),
        ({"scheduler": None}, "scheduler=None"),
        ({"cache": 5}, "cache=5"),
        ({"cache": {"size": 3}}, "size"),
        ({"seed": None}, "seed=None"),
        ({"seed": True}, "seed=True"),
        ({"tensor_parallel_size": 0}, "parallel.tp=0"),
        ({"pipeline_parallel_size": -1}, "parallel.pp=-1"),
        ({"num_blocks": 10**9}, "engine.num_blocks=1000000000"),
    ],
)
def test_wrong_options_are_refused_before_weights_are_read(options, message, monkeypatch):
    monkeypatch.setattr(
        "plugins.executors.torch.execution.load", lambda *args, **kwargs: pytest.fail("weights are read")
    )
    with pytest.raises(ConfigError, match=message):
        LLM(str(variant("qwen3")), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 10**6}, "engine.max_model_len=1000000: the model's context is 4096"),
        ({"max_inflight": 99}, "engine.max_inflight=99"),
    ],
)
def test_limits_that_the_model_cannot_keep(options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(str(variant("qwen3")), **options)


@pytest.mark.parametrize("model", [None, 5, "", b"tiny"], ids=repr)
def test_a_model_that_is_no_name(model):
    with pytest.raises(ConfigError, match="model="):
        LLM(model)


def test_a_model_without_tokenizer_takes_token_ids_only():
    shape = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
        "dtype": "float32",
    }
    llm = LLM("some/model", load_format="dummy", device="cpu", num_blocks=16, **shape)
    answer = llm.generate([[1, 2, 3]], GREEDY)[0]
    assert len(answer.outputs[0].token_ids) == 8 and answer.outputs[0].text == ""
    with pytest.raises(ModelError, match="no tokenizer"):
        llm.generate("text", GREEDY)
    assert "stop_token_ids" in llm.generate([[1]], SamplingParams(stop="x"))[0].error
