"""Text to tokens: the same as transformers makes of the same files, or a refusal that says why."""

from __future__ import annotations

import json
import os

import pytest
from helpers.tokenizers_made import added, byte_level, edit, metaspace, write
from helpers.torch_engines import AutoModelForCausalLM  # noqa: F401 - sets transformers up, offline
from transformers import AutoTokenizer

from headway import ModelError
from plugins.models.tiny import LLAMA, QWEN3
from plugins.models.tokenizer import Tokenizer

TEXTS = (
    "Hello the Paris is",
    " the  Paris\n",
    "<s>the</s> the",
    "[INST] the <tool> Paris </tool>x",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't 12345  x",
    "e\u0301 é €",
    "<extra> a <image> <pad>",
    "<new>the",
    "",
)


def check_same(directory):
    """The same ids, texts and named tokens as transformers' tokenizer of this directory."""
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    named = ours._named_tokens
    assert named == theirs.special_tokens_map
    return ours


# ---- which tokens there are ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_a_plain_checkpoint(tmp_path, kind):
    check_same(kind(tmp_path))


SETTINGS = {
    "a named token as an object": {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True}},
    "named tokens that are new": {"bos_token": "<new>", "unk_token": "<pad>"},
    "a named token of the model's own": {"image_token": "<image>"},
    "special tokens without a name": {"additional_special_tokens": ["<extra>", "<image>"]},
    "named ones in extra_special_tokens": {
        "extra_special_tokens": {"image_token": "<image>", "other": "<extra>"}
    },
    "added tokens": {
        "added_tokens_decoder": {
            "513": added("</tool>", special=False, lstrip=True),
            "512": added("<tool>", special=False),
            "256": added("<|endoftext|>"),
            "600": added("<extra>"),
        },
    },
    "an added token that is not special after all": {
        "added_tokens_decoder": {"257": added("<|im_start|>", special=False)}
    },
    "an added token that is a word": {
        "added_tokens_decoder": {"512": added("the", special=False, single_word=True, normalized=True)}
    },
    "special tokens are split": {"split_special_tokens": True},
    "Qwen2's class": {"tokenizer_class": "Qwen2TokenizerFast"},
    "no class at all": {"tokenizer_class": None, "eos_token": None, "pad_token": None},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokenizer_config(tmp_path, settings):
    check_same(byte_level(tmp_path, **settings))


LLAMAS = {
    "its class": {"tokenizer_class": "LlamaTokenizer"},
    "its class, legacy": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    "no blank before the first word": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    "its post-processor counts, not its flags": {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
    },
}


@pytest.mark.parametrize("settings", LLAMAS.values(), ids=LLAMAS)
def test_llamas_class_brings_its_own_rules_for_blanks(tmp_path, settings):
    check_same(metaspace(tmp_path, **settings))


def test_qwen2_models_have_their_class_whatever_the_file_says(tmp_path):
    check_same(
        write(
            byte_level(tmp_path),
            "config.json",
            QWEN3 | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        )
    )


def test_llamas_class_of_a_byte_level_file_is_not_taken_at_its_word(tmp_path):
    check_same(write(byte_level(tmp_path, tokenizer_class="LlamaTokenizer"), "config.json", LLAMA))


MAPS = {
    "names and others": {
        "bos_token": added("<new>"),
        "eos_token": "<|endoftext|>",
        "additional_special_tokens": ["<extra>"],
    },
    "a name of the model's own": {"image_token": added("<image>"), "other_token": "<extra>"},
}


@pytest.mark.parametrize("found", MAPS.values(), ids=MAPS)
def test_special_tokens_map(tmp_path, found):
    check_same(write(byte_level(tmp_path), "special_tokens_map.json", found))


def test_special_tokens_map_is_for_checkpoints_without_added_tokens_decoder(tmp_path):
    directory = byte_level(tmp_path, added_tokens_decoder={})
    assert (
        "bos_token"
        not in check_same(write(directory, "special_tokens_map.json", {"bos_token": "<new>"}))._named_tokens
    )


def test_added_tokens_of_old_checkpoints(tmp_path):
    check_same(
        write(byte_level(tmp_path), "added_tokens.json", {"<tool>": 512, "<extra>": 514, "<|im_end|>": 258})
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos_token": False}, "bos_token=False"),
        ({"eos_token": 5}, "eos_token=5"),
        ({"eos_token": {"content": "<s>"}}, "eos_token"),
        ({"extra_special_tokens": "<extra>"}, "extra_special_tokens"),
        ({"added_tokens_decoder": ["<extra>"]}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": added("<extra>")}}, "added_tokens_decoder"),
        ({"chat_template": 5}, "chat_template"),
        ({"chat_template": [{"name": "default"}]}, "chat_template"),
    ],
)
def test_what_is_no_token_is_refused_by_file_and_field(tmp_path, settings, message):
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: {message}"):
        _ = Tokenizer(byte_level(tmp_path, **settings)).has_chat_template


# ---- files -----------------------------------------------------------------------------------------------


def test_padding_and_truncation_of_the_file_are_those_of_training(tmp_path):
    found = json.loads((byte_level(tmp_path) / "tokenizer.json").read_text())
    found["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    found["padding"] = {
        "strategy": {"Fixed": 32},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    write(tmp_path, "tokenizer.json", found)
    tokenizer = Tokenizer(tmp_path)
    assert len(tokenizer.encode("x" * 40)) > 32 and len(tokenizer.encode("Hi")) == 2
    assert len(tokenizer.encode_chat([{"role": "user", "content": "x" * 40}])) > 40


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ],
)
def test_a_pipe_in_place_of_a_file_is_no_wait(tmp_path, name):
    (byte_level(tmp_path) / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=rf"{name} is a fifo: expected a file"):
        _ = Tokenizer(tmp_path).has_chat_template


def test_a_link_to_nothing_is_no_missing_file(tmp_path):
    byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is a link to .*nowhere"):
        _ = Tokenizer(tmp_path).has_chat_template


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_gigabytes_in_place_of_a_small_file_are_not_read(tmp_path, name):
    byte_level(tmp_path)
    with open(tmp_path / name, "w") as file:
        file.truncate(4 << 30)
    with pytest.raises(ModelError, match=rf"{name} has 4294967296 bytes: expected"):
        _ = Tokenizer(tmp_path).has_chat_template


def test_broken_json_is_named_by_file_and_line(tmp_path):
    write(byte_level(tmp_path), "tokenizer_config.json", '{\n"a": ]')
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read: not valid JSON \(.*line 2"):
        Tokenizer(tmp_path)
    write(tmp_path, "tokenizer_config.json", "[" * 100_000)
    with pytest.raises(ModelError, match="nested too deeply"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "\0" * 100]
)
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    write(byte_level(tmp_path), "tokenizer.json", content)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)


# ---- texts -----------------------------------------------------------------------------------------------


def test_half_a_character_is_refused(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path))
    with pytest.raises(ModelError, match=r"'\\ud83d' at 3, half of a surrogate pair"):
        tokenizer.encode("ok \ud83d")
    with pytest.raises(ModelError, match="half of a surrogate pair"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud83d"}])


def test_a_kind_of_text_is_a_text(tmp_path):
    class Text(str):
        pass

    tokenizer = Tokenizer(byte_level(tmp_path))
    assert tokenizer.encode(Text("Hello")) == tokenizer.encode("Hello")


def test_a_text_beyond_the_context_is_known_before_its_tokens_are_made(tmp_path):
    directory = byte_level(tmp_path)
    expected = (
        r"prompt of 100,000,000 characters does not fit the context of 4,096: "
        r"its beginning alone has \d\d,\d{3} tokens"
    )
    with pytest.raises(ModelError, match=expected):
        Tokenizer(directory, max_tokens=4096).encode("word " * 20_000_000)
    text = "word " * 60_000
    assert Tokenizer(directory, max_tokens=200_000).encode(text) == Tokenizer(directory).encode(text), (
        "may fit: made as a whole"
    )


# ---- chat templates --------------------------------------------------------------------------------------

EACH = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
END = "<|im_end|>\n{% endfor %}"
USER = [{"role": "user", "content": "hi"}]
CALL = {"function": {"name": "f", "arguments": {"zeta": 1, "alpha": "x>y"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
TEMPLATES = {
    "JSON as it is": (
        EACH + "{{ m['content'] | tojson }}" + END,
        [{"role": "tool", "content": "a < b & c's 25°C 東京"}],
        {},
    ),
    "JSON keeps its order": (
        EACH + "{% for c in m.tool_calls %}{{ c.function.arguments | tojson(indent=2) }}{% endfor %}" + END,
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        {},
    ),
    "generation": (EACH + "{% generation %}{{ m.content }}{% endgeneration %}" + END, USER, {}),
    "no tools": (
        "{% if tools is not none or documents is not none %}TOOLS{% endif %}"
        + EACH
        + "{{ m.content }}"
        + END,
        USER,
        {},
    ),
    "tools": ("{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + EACH + END, USER, {"tools": [TOOL]}),
    "documents": (
        "{% for d in documents %}{{ d.title }}{% endfor %}" + EACH + END,
        USER,
        {"documents": [{"title": "a", "text": "b"}]},
    ),
    "no prompt for an answer": (
        EACH + "{{ add_generation_prompt }}" + END,
        USER,
        {"add_generation_prompt": False},
    ),
    "a variable of one's own": ("{{ enable_thinking }}" + EACH + END, USER, {"enable_thinking": False}),
    "parts": (
        EACH
        + "{% if m.content is string %}{{ m.content }}{% else %}"
        + "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
        + END,
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        {},
    ),
    "parts as they are": (
        EACH + "{{ m.content }}" + END,
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        {},
    ),
    "no content": (EACH + "{{ m.content }}" + END, [{"role": "assistant", "content": None}], {}),
    "no role": ("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", [{"content": "hi"}], {}),
    "None within": (EACH + "{{ m.a }}" + END, [{"role": "user", "a": {"b": None}}], {}),
    "reasoning": (
        EACH + "{{ m.reasoning_content }}{{ m.thinking }}" + END,
        [{"role": "assistant", "reasoning": "so"}],
        {},
    ),
    "special tokens": (
        "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ sep_token }}" + EACH + END,
        USER,
        {},
    ),
    "today": ("{{ strftime_now('%Y') }}" + EACH + END, USER, {}),
    "break": (EACH + "{{ m.content }}{% break %}{% endfor %}", [*USER, *USER], {}),
    "namespace and dict": (
        "{% set ns = namespace(a=1) %}{% set ns.a = dict(b=2) %}{{ ns.a }}" + EACH + END,
        USER,
        {},
    ),
    "blocks leave no blanks": ("  {% if true %}\n  x\n  {% endif %}\n" + EACH + END, USER, {}),
    "objects are no code": (EACH + "{{ m.content }}" + END, [{"role": "user", "content": object()}], {}),
    "refused": ("{{ raise_exception('no') }}", USER, {}),
    "an underscore": ("{% set ns = namespace(_a=1) %}", USER, {}),
    "out of the sandbox": ("{{ ''.__class__.__mro__ }}", USER, {}),
    "a change": ("{{ messages.append(1) }}", USER, {}),
    "an empty conversation": (EACH + END, [], {}),
    "no messages": (EACH + END, ["hi"], {}),
    "an undefined value's field": ("{{ nothing.at.all }}", USER, {}),
    "a syntax error": ("{% for %}", USER, {}),
    "tools that are none": (EACH + END, USER, {"tools": ["look"]}),
}


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """(ours, transformers') of one checkpoint; tests set the template."""
    directory = byte_level(tmp_path_factory.mktemp("chat"), bos_token="<s>", image_token="<image>")
    return directory, AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(("template", "messages", "options"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_renders_as_in_transformers(chatting, template, messages, options):
    directory, theirs = chatting
    ours = Tokenizer(edit(directory, chat_template=template))
    theirs.chat_template = template
    asked = {"add_generation_prompt": True} | options
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **asked)
    except Exception:
        with pytest.raises(ModelError):
            ours.encode_chat(messages, **options)
        return
    assert ours._template.render(messages, **options) == expected
    assert ours.encode_chat(messages, **options) == theirs.apply_chat_template(
        messages, return_dict=False, **asked
    )


def test_one_of_several_templates(chatting):
    directory, _ = chatting
    named = [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T"},
        {"name": "rag", "template": "R"},
    ]
    ours = Tokenizer(edit(directory, chat_template=named))
    theirs = AutoTokenizer.from_pretrained(directory)
    for options in (
        {},
        {"tools": [TOOL]},
        {"chat_template": "rag"},
        {"chat_template": "own {{ bos_token }}"},
    ):
        assert ours._template.render(USER, **options) == theirs.apply_chat_template(
            USER, tokenize=False, **options
        )
    with pytest.raises(ModelError, match="rag, tool_use and no default"):
        Tokenizer(edit(directory, chat_template=named[1:])).encode_chat(USER)


def test_template_files_win_over_the_config(tmp_path):
    directory = byte_level(tmp_path, chat_template="config")
    (directory / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        write(directory, name, name)
        ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
        for tools in (None, [TOOL]):
            assert ours._template.render(USER, tools=tools) == theirs.apply_chat_template(
                USER, tools=tools, tokenize=False
            )


def test_without_a_template_there_is_no_chat(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(ModelError, match="has no chat template: give plain texts"):
        tokenizer.encode_chat(USER)
