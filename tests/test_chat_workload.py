"""workload=chat with a real tokenizer: what it refuses is one refused request."""

from __future__ import annotations

import json

from helpers.tokenizers_made import byte_level, edit

from plugins.models.tokenizer import Tokenizer
from plugins.workloads.chat import Chat


def asked(directory, texts, **parameters):
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    workload = Chat(path=str(path), **parameters)
    workload.tokenizer = Tokenizer(directory, max_tokens=4096)
    return list(workload.arrivals(0, 512, 4096))


def test_a_prompt_that_is_far_too_long_is_refused_and_the_rest_asked(tmp_path):
    long, good = asked(byte_level(tmp_path), ["word " * 200_000, "Hi"])
    assert "does not fit the context of 4,096" in long.refusal and long.prompt_token_ids == []
    assert good.refusal == "" and Tokenizer(tmp_path).decode(good.prompt_token_ids, False).endswith(
        "user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_the_template_refuses_is_refused(tmp_path):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ "
        "messages[0].content }}"
    )
    directory = edit(byte_level(tmp_path), chat_template=template)
    (refused,) = asked(directory, ["Hi"], system="Be brief.")
    assert "refuses these messages: no system" in refused.refusal
    assert asked(directory, ["Hi"])[0].prompt_token_ids == Tokenizer(directory).encode("Hi")
