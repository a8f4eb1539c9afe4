"""What a model is, read from its config.json: the shape that the core knows, and what only the model code needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headway import ConfigError, ModelConfig, ModelError, ModelShape

from . import ARCHITECTURES, architecture
from .checkpoints import find_checkpoint

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelSpec:
    """A model before its weights."""

    shape: ModelShape
    directory: Path | None = None  # of the checkpoint and tokenizer; None: random weights, no tokenizer
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)  # Hugging Face's fields; empty: plain rotary embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: frozenset[int] = frozenset()
    random_weights: bool = False


def read_model(config: ModelConfig) -> ModelSpec:
    """The model that a `model` node names. Reads no weights. Raises ModelError or ConfigError, before anything is loaded."""
    if config.load_format == "dummy" and config.has_shape:
        shape = config.shape()
        if shape.architecture not in ARCHITECTURES:
            architecture(shape.architecture)
        return ModelSpec(shape, qkv_bias=shape.architecture == "Qwen2ForCausalLM", random_weights=True)
    directory = find_checkpoint(config.name_or_path)
    spec = read_config(directory, config.dtype)
    if config.load_format == "dummy":
        spec = replace(spec, random_weights=True)
    return spec


def read_config(directory: Path, dtype: str | None = None) -> ModelSpec:
    """From a checkpoint directory's config.json and generation_config.json."""
    config = _read_json(directory / "config.json")
    architecture((config.get("architectures") or ["none named"])[0])
    try:
        shape = ModelShape.from_hf(config, dtype)
    except ConfigError as error:
        raise ModelError(f"{directory / 'config.json'}: {error}") from None
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ModelError(f"{directory / 'config.json'}: hidden_act={act!r}: expected silu, the only one these architectures use")
    if config.get("use_sliding_window"):
        raise ModelError(f"{directory / 'config.json'}: use_sliding_window=true: sliding-window attention is not supported")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ModelError(f"{directory / 'config.json'}: rope scaling {kind!r}: expected one of {', '.join(ROPE_TYPES)}")
    qwen2 = shape.architecture == "Qwen2ForCausalLM"
    bias = bool(config.get("attention_bias", False))
    generation = directory / "generation_config.json"
    eos = (_read_json(generation) if generation.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    return ModelSpec(
        shape,
        directory,
        rope_scaling={**scaling, "rope_type": kind},
        qkv_bias=bias or qwen2,
        o_bias=bias and not qwen2,
        mlp_bias=bool(config.get("mlp_bias", False)),
        eos_token_ids=frozenset(eos if isinstance(eos, list) else () if eos is None else (eos,)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"{path} cannot be read: expected a checkpoint in Hugging Face format (config.json, *.safetensors)") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
