"""Checkpoints as people have them: the answers are transformers' from the same directory, or a refusal that
says why.

transformers itself writes each checkpoint; then its config.json and files are made what the case is about.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.torch_engines import engine_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from headway import Arrival, ModelConfig, ModelError, SamplingParams
from plugins.executors.torch import TorchExecutor
from plugins.models import layers
from plugins.models.layers import rotary_table
from plugins.models.spec import read_config

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
}
BASES: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    "qwen2": SIZES | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0},
    "qwen3": SIZES
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1000000.0, "head_dim": 16},
}
#: What decides the shapes of tensors; the checkpoint is written with these alone, so that a case may spoil
#: the rest.
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings")
STRUCTURE = (
    *(name for name in SIZES if name not in ("rms_norm_eps", "hidden_act", "dtype")),
    "head_dim",
    *FLAGS,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
PROMPT = torch.randint(99, (40,), generator=torch.Generator().manual_seed(3)).tolist()
STEPS = 5


def absent(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, ABSENT)


ABSENT = object()


@dataclass(frozen=True)
class Case:
    model: str
    changes: dict[str, Any]  # of config.json; ABSENT: without the field
    files: Callable[[Path], None] | None = None
    refused: str | None = None  # part of the message; None: the answers are transformers'
    shard: str = "1GB"


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def store(directory: Path, weights: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file(weights, directory / name, metadata={"format": "pt"})


def change(alter: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> Callable[[Path], None]:
    """A step that renames, converts or (None) drops tensors."""

    def step(directory: Path) -> None:
        altered = (alter(name, tensor) for name, tensor in weights_of(directory).items())
        store(directory, dict(pair for pair in altered if pair))

    return step


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    return change(lambda name, tensor: (name, tensor.to(dtype)))


def mixed(directory: Path) -> None:
    change(lambda n, t: (n, t.bfloat16() if "mlp" in n else t))(directory)


def half_of_the_shards(directory: Path) -> None:
    for shard in sorted(directory.glob("model-*.safetensors"))[::2]:
        store(directory, {name: tensor.bfloat16() for name, tensor in load_file(shard).items()}, shard.name)


def another_head(directory: Path) -> None:
    weights = weights_of(directory)
    store(directory, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].flip(0).contiguous()})


def the_same_head(directory: Path) -> None:
    weights = weights_of(directory)
    store(directory, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})


def head_alone(directory: Path) -> None:
    change(lambda n, t: ("lm_head.weight" if n == "model.embed_tokens.weight" else n, t))(directory)


def stray_files(directory: Path) -> None:
    store(
        directory,
        {name: tensor * 0 for name, tensor in weights_of(directory).items()},
        "model.fp16.safetensors",
    )
    store(
        directory,
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
        "adapter_model.safetensors",
    )
    store(directory, {"state.0.exp_avg": torch.ones(2)}, "optimizer.safetensors")


def stale_shards(directory: Path) -> None:
    weights = {name: tensor.flip(0).contiguous() for name, tensor in weights_of(directory).items()}
    store(directory, weights, "model-00001-of-00001.safetensors")
    listed = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(listed))


def a_shard_that_is_not_listed(directory: Path) -> None:
    stray = next(iter(sorted(directory.glob("model-*.safetensors"))))
    store(
        directory, {name: t * 0 for name, t in load_file(stray).items()}, "model-99999-of-99999.safetensors"
    )


def spoil(value: float, name: str = "model.layers.1.mlp.down_proj.weight") -> Callable[[Path], None]:
    def step(directory: Path) -> None:
        weights = weights_of(directory)
        weights[name][3, 5] = value
        store(directory, weights)

    return step


def describe(**changes: Any) -> Callable[[Path], None]:
    """Another config.json for the same weights."""

    def step(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return step


def with_old_buffers(directory: Path) -> None:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    store(directory, weights_of(directory) | {name: torch.ones(4) for name in names})


def only_pickles(directory: Path) -> None:
    torch.save(weights_of(directory), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def llama(changes: dict[str, Any] | None = None, **rest: Any) -> Case:
    return Case("llama", changes or {}, **rest)


def qwen2(changes: dict[str, Any] | None = None, **rest: Any) -> Case:
    return Case("qwen2", changes or {}, **rest)


def qwen3(changes: dict[str, Any] | None = None, **rest: Any) -> Case:
    return Case("qwen3", changes or {}, **rest)


CASES = {
    # shapes
    "llama": llama(),
    "qwen2": qwen2(),
    "qwen3": qwen3(),
    "llama: one KV head, 8 heads of 4": llama({"num_attention_heads": 8, "num_key_value_heads": 1}),
    "llama: KV heads are null": llama({"num_key_value_heads": None}),
    "llama: KV heads are absent": llama(absent("num_key_value_heads")),
    "llama: head_dim is null": llama({"head_dim": None}),
    "llama: head_dim of its own": llama({"head_dim": 24}),
    "qwen2: head_dim of its own": qwen2({"head_dim": 12}),
    "qwen2: head_dim is null": qwen2({"head_dim": None}, refused="head_dim=null"),
    "qwen3: head_dim is null": qwen3({"head_dim": None}, refused="head_dim=null"),
    "qwen3: head_dim is absent, so 128": qwen3({"head_dim": ABSENT}),
    "qwen3: KV heads are absent, so 32": qwen3(
        {"num_key_value_heads": ABSENT}, refused="num_key_value_heads=32"
    ),
    "llama: hidden size that heads do not divide": llama(
        files=describe(num_attention_heads=5, num_key_value_heads=5), refused="no multiple of"
    ),
    "qwen3: hidden size that heads do not divide": qwen3({"hidden_size": 38, "intermediate_size": 31}),
    "qwen3: one token in the vocabulary more": qwen3({"vocab_size": 101, "tie_word_embeddings": True}),
    "qwen3: three layers": qwen3({"num_hidden_layers": 3}),
    "llama: the vocabulary of config.json is larger": llama(
        files=change(lambda n, t: (n, t[:90]) if "embed" in n else (n, t)), refused="[90, 32]"
    ),
    # biases
    "llama: biases everywhere": llama({"attention_bias": True, "mlp_bias": True}),
    "qwen3: attention_bias": qwen3({"attention_bias": True}),
    "qwen3: mlp_bias is ignored": qwen3({"mlp_bias": True}),
    "qwen2: attention_bias is ignored": qwen2({"attention_bias": False}),
    "llama: attention_bias is text": llama({"attention_bias": "false"}, refused="attention_bias='false'"),
    # the head
    "llama: tied": llama({"tie_word_embeddings": True}),
    "qwen2: tied, and the file repeats the table": qwen2({"tie_word_embeddings": True}, files=the_same_head),
    "qwen3: tied, and the file has another head": qwen3({"tie_word_embeddings": True}, files=another_head),
    "qwen3: tied, and the file has the head alone": qwen3({"tie_word_embeddings": True}, files=head_alone),
    "llama: not tied, without a head": llama(
        files=change(lambda n, t: None if "lm_head" in n else (n, t)), refused="'lm_head.weight' is missing"
    ),
    "llama: tying is not said": llama(absent("tie_word_embeddings")),
    "llama: tying is null": llama({"tie_word_embeddings": None}, refused="tie_word_embeddings=None"),
    # rotary embedding
    "llama: theta in rope_parameters": llama(
        {"rope_theta": ABSENT, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    ),
    "qwen3: theta in both, the inner counts": qwen3(
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    ),
    "llama: theta in rope_scaling": llama(
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}
    ),
    "llama: rope_scaling goes before rope_parameters": llama(
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
        }
    ),
    "llama: theta is absent": llama(absent("rope_theta")),
    "llama: theta is a whole number": llama({"rope_theta": 500}),
    "llama: theta is null": llama({"rope_theta": None}, refused="rope_theta=None"),
    "llama: theta is negative": llama({"rope_theta": -1.0}, refused="rope_theta=-1.0"),
    "llama: theta is absurd": llama({"rope_theta": 1e300}, refused="rope_theta=1e+300"),
    "llama: llama3": llama({"rope_scaling": LLAMA3}),
    "llama: llama3, the outer context counts": llama(
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}
    ),
    "llama: llama3 without its context": llama(
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k}}
    ),
    "llama: llama3 without a factor": llama(
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if "low" not in k}}, refused="lacks low_freq_factor"
    ),
    "qwen2: yarn": qwen2({"rope_scaling": YARN}),
    "qwen3: yarn by its older key": qwen3(
        {"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in YARN.items()}}
    ),
    "qwen3: yarn with all its numbers": qwen3(
        {
            "rope_parameters": YARN
            | {
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
                "rope_theta": 5e5,
            }
        }
    ),
    "llama: yarn, attention factor and no factor": llama(
        {"rope_scaling": YARN | {"factor": None, "attention_factor": 1.3}}
    ),
    "llama: dynamic": llama({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "llama: longrope": llama(
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        refused="'longrope'",
    ),
    "llama: a factor that is text": llama(
        {"rope_scaling": {"type": "linear", "factor": "4.0"}}, refused="factor='4.0'"
    ),
    "llama: part of a head, scaled": llama(
        {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        refused="partial_rotary_factor=0.5",
    ),
    "qwen3: part of a head, which the plain type ignores": qwen3({"partial_rotary_factor": 0.5}),
    "qwen3: other rotations for other layers": qwen3(
        {"rope_parameters": {"full_attention": YARN}}, refused="rope_parameters.full_attention"
    ),
    # windows
    "qwen2: a window that is not used": qwen2(
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}
    ),
    "qwen2: windows from a layer that is not there": qwen2(
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    ),
    "qwen3: windows in a layer": qwen3(
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, refused="sliding-window"
    ),
    "qwen2: windows of nothing": qwen2(
        {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1}, refused="sliding-window"
    ),
    "qwen3: windows as wide as the context": qwen3(
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}
    ),
    "qwen3: layer_types are all full": qwen3(
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 2,
        }
    ),
    "qwen3: a sliding layer without a window": qwen3(
        {"layer_types": ["full_attention", "sliding_attention"]}, refused="sliding-window"
    ),
    "llama: a window": llama({"sliding_window": 4}, refused="sliding-window"),
    "llama: a window as wide as the context": llama({"sliding_window": 512}),
    "llama: attention in chunks": llama({"attention_chunk_size": 8}, refused="attention_chunk_size=8"),
    # numbers
    "llama: a large eps": llama({"rms_norm_eps": 0.3}),
    "qwen3: eps is absent": qwen3(absent("rms_norm_eps")),
    "llama: eps is text": llama({"rms_norm_eps": "1e-5"}, refused="rms_norm_eps='1e-5'"),
    "llama: eps is negative": llama({"rms_norm_eps": -1e-5}, refused="rms_norm_eps=-1e-05"),
    "llama: a layer count with a fraction": llama(
        {"num_hidden_layers": 2.0}, refused="num_hidden_layers=2.0"
    ),
    "llama: a negative size": llama({"intermediate_size": -48}, refused="intermediate_size=-48"),
    "llama: a billion layers": llama({"num_hidden_layers": 10**9}, refused="num_hidden_layers=1000000000"),
    "llama: padding outside the vocabulary": llama({"pad_token_id": 99}, refused="pad_token_id=99"),
    "llama: padding at -1": llama({"pad_token_id": -1}),
    "llama: pretraining_tp changes nothing": llama({"pretraining_tp": 2}),
    "llama: swish is silu": llama({"hidden_act": "swish"}),
    "llama: gelu": llama({"hidden_act": "gelu"}, refused="hidden_act='gelu'"),
    "llama: capped logits": llama({"final_logit_softcapping": 30.0}, refused="final_logit_softcapping=30.0"),
    # which model
    "qwen3: architectures are absent": qwen3(absent("architectures")),
    "llama: architectures name the bare decoder": llama({"architectures": ["LlamaModel"]}),
    "llama: architectures contradict model_type": llama(
        {"architectures": ["Qwen2ForCausalLM"]}, refused="contradict"
    ),
    "llama: a classifier": llama(
        {"architectures": ["LlamaForSequenceClassification"]}, refused="'LlamaForSequenceClassification'"
    ),
    "llama: inside a multimodal model": llama({"text_config": {"hidden_size": 32}}, refused="text_config"),
    "llama: quantized": llama(
        {"quantization_config": {"quant_method": "fp8"}}, refused="quantization_config"
    ),
    # files and types
    "qwen3: shards": qwen3(shard="12KB"),
    "llama: shards, and one that the index does not list": llama(
        shard="12KB", files=a_shard_that_is_not_listed
    ),
    "llama: shards of an earlier save": llama(files=stale_shards),
    "llama: adapters, other precisions, optimizers": llama(files=stray_files),
    "qwen2: names without their prefix": qwen2(files=change(lambda n, t: (n.removeprefix("model."), t))),
    "llama: names with one prefix too many": llama(files=change(lambda n, t: (f"model.{n}", t))),
    "llama: rotary buffers of old checkpoints": llama(files=with_old_buffers),
    "llama: pickles only": llama(files=only_pickles, refused="pickles and GGUF are not read"),
    "llama: bfloat16 in the file": llama(files=cast(torch.bfloat16)),
    "llama: float16 in the file": llama(files=cast(torch.float16)),
    "qwen3: float64 in the file": qwen3(files=cast(torch.float64)),
    "qwen3: bfloat16 and float32 in the file": qwen3(files=mixed),
    "llama: the type is in torch_dtype": llama({"dtype": ABSENT, "torch_dtype": "float32"}),
    "llama: no type, so the file's": llama(absent("dtype")),
    "llama: a type that transformers does not know": llama(
        {"dtype": "torch.float32"}, refused="dtype='torch.float32'"
    ),
    "llama: int8 in the file": llama(files=cast(torch.int8), refused="holds I8"),
    "llama: NaN": llama(files=spoil(float("nan")), refused="NaN or infinite"),
    "llama: infinity": llama(files=spoil(float("-inf")), refused="NaN or infinite"),
    "llama: a layer is missing": llama(
        {"num_hidden_layers": 3},
        files=change(lambda n, t: None if ".2." in n else (n, t)),
        refused="layers.2.",
    ),
}


def write(directory: Path, case: Case, seed: int = 0) -> None:
    """By transformers, in the sizes that the case's config.json describes where it describes possible
    ones."""
    config = {
        name: value for name, value in (BASES[case.model] | case.changes).items() if value is not ABSENT
    }
    sizes = BASES[case.model] | {
        name: value for name, value in case.changes.items() if name in STRUCTURE and possible(name, value)
    }
    made = AutoConfig.for_model(
        case.model,
        **{name: value for name, value in sizes.items() if name in STRUCTURE and value is not ABSENT},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.3)
    model.save_pretrained(directory, max_shard_size=case.shard)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if case.files:
        case.files(directory)


def possible(name: str, value: Any) -> bool:
    if value is ABSENT or value is None:
        return name in ("head_dim", "num_key_value_heads") and (name, value) != ("head_dim", None)
    return type(value) is bool if name in FLAGS else type(value) is int and 0 < value < 1000


@torch.inference_mode()
def reference(directory: Path) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the log-probabilities of the whole vocabulary at each, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens, rows = list(PROMPT), []
    for _ in range(STEPS):
        rows.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
    return tokens[len(PROMPT) :], torch.stack(rows)


def ours(directory: Path, vocab: int) -> tuple[list[int], torch.Tensor]:
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(name_or_path=str(directory), dtype="float32"))
    asked = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=vocab)
    (output,) = engine_of(executor, num_blocks=64).run([Arrival(0.0, PROMPT, asked)]).outputs
    assert output.state == "finished", output
    rows = torch.tensor([[at.best[id] for id in range(vocab)] for at in output.logprobs])
    return output.output_token_ids, rows


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_transformers_or_a_refusal_that_says_why(name, tmp_path):
    case = CASES[name]
    write(tmp_path, case, seed=list(CASES).index(name))
    if case.refused is not None:
        with pytest.raises(ModelError) as caught:
            ours(tmp_path, 99)
        assert case.refused in str(caught.value) and str(tmp_path) in str(caught.value)
        return
    tokens, rows = reference(tmp_path)
    found, found_rows = ours(tmp_path, rows.shape[1])
    assert found == tokens
    torch.testing.assert_close(found_rows, rows, atol=2e-4, rtol=2e-4)


def test_the_matrix_notices_another_rotation(tmp_path, monkeypatch):
    write(tmp_path, CASES["llama: llama3"])
    tokens, rows = reference(tmp_path)
    monkeypatch.setattr(layers, "_llama3", lambda frequency, rope: frequency)
    assert not torch.allclose(ours(tmp_path, rows.shape[1])[1], rows, atol=2e-4, rtol=2e-4)


# ---- facts that no logits of a short prompt show ---------------------------------------------------------


@pytest.mark.parametrize(
    "scaling",
    [{}, {"type": "linear", "factor": 3.0}, LLAMA3, YARN, {"type": "dynamic", "factor": 2.0}],
    ids=str,
)
def test_rotary_tables_are_those_of_transformers_at_the_end_of_a_long_context(scaling, tmp_path):
    write(tmp_path, Case("qwen3", {"max_position_embeddings": 131072, "rope_scaling": scaling}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).model
    cos, sin = model.rotary_emb(torch.zeros(1), torch.arange(131072)[None])
    half = cos.shape[-1] // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    torch.testing.assert_close(rotary_table(read_config(tmp_path)), expected, atol=1e-6, rtol=0)


BF16, F16 = cast(torch.bfloat16), cast(torch.float16)


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({}, BF16),
        ({"dtype": "float16"}, BF16),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, None),
        (absent("dtype"), BF16),
        (absent("dtype"), F16),
        (absent("dtype"), None),
        (absent("dtype"), mixed),
        (absent("dtype"), half_of_the_shards),
        ({"dtype": None, "torch_dtype": "float16"}, None),
    ],
)
def test_the_type_is_the_config_s_or_else_the_file_s(changes, files, tmp_path):
    write(
        tmp_path, Case("llama", changes, files=files, shard="12KB" if files is half_of_the_shards else "1GB")
    )
    expected = str(AutoModelForCausalLM.from_pretrained(tmp_path).dtype).removeprefix("torch.")
    assert (
        read_config(tmp_path).shape.dtype == expected == ModelConfig(name_or_path=str(tmp_path)).shape().dtype
    )
    assert read_config(tmp_path, "float64").shape.dtype == "float64"


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        (7, None),
        ([7, 8], None),
        (None, None),
        (ABSENT, None),
        (7, {"eos_token_id": 8}),
        (7, {"eos_token_id": [8, 9]}),
        (7, {"eos_token_id": None}),
        (7, {"eos_token_id": []}),
        (7, {"do_sample": True}),
        ([], None),
    ],
)
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_the_ends_of_an_answer_are_those_of_transformers(model, config, generation, tmp_path):
    write(tmp_path, Case(model, {"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ends = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert read_config(tmp_path).eos_token_ids == set(
        ends if isinstance(ends, list) else [] if ends is None else [ends]
    )


@pytest.mark.parametrize("wrong", ["7", [7, "8"], [[7]], 7.0, True, {"7": 8}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_that_are_no_token_ids_are_refused(file, wrong, tmp_path):
    write(tmp_path, Case("llama", {"eos_token_id": wrong if file == "config.json" else 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ModelError, match=f"{file}: eos_token_id="):
        read_config(tmp_path)


def test_ends_outside_the_vocabulary_never_come(tmp_path):
    write(tmp_path, Case("llama", {"eos_token_id": [-1, 98, 99, 10**30]}))
    assert read_config(tmp_path).eos_token_ids == {98}


def test_the_simulator_counts_a_head_of_its_own(tmp_path):
    write(tmp_path, Case("qwen3", {"tie_word_embeddings": True}, files=another_head))
    shape = ModelConfig(name_or_path=str(tmp_path)).shape()
    assert not shape.tie_word_embeddings and shape == read_config(tmp_path).shape
