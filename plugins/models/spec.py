"""What a model is, read from its checkpoint: the shape that the core knows, and what the model code needs.

| fact | read as transformers 5 does | refused |
|---|---|---|
| architecture | model_type, else architectures: Llama, Qwen2, Qwen3 | others; contradictions; text_config |
| files | `model.safetensors`, else its index's shards | pickles; names outside the folder; a tensor twice |
| names | with or without `model.`, one too many | tensors that are missing or left over |
| head | tied, unless the file holds a head with other values | untied without a head |
| sizes | defaults of the architecture where a field is absent | text, fractions, zero, what no model has |
| rotary | default, linear, llama3, yarn, dynamic within the context | others; one for each kind of layer |
| its numbers | `rope_scaling` before `rope_parameters`, theta inside before theta beside | absurd ones |
| attention | full; a window that spans the context | windows in any layer, chunks, `is_causal: false` |
| biases | `attention_bias` (Llama, Qwen3), q, k and v (Qwen2), `mlp_bias` (Llama) | - |
| dtype | `model.dtype`, `dtype`, `torch_dtype`, the first weight's | integers, fp8, `quantization_config` |
| weights | floats of any width, converted | NaN, infinity, another shape |
| ends | generation_config.json alone where there is one, else config.json | ids that are no whole numbers |

Scales and caps of logits, which other architectures have, are refused too. The rules are in
`core/compose/hf_config.py` and `core/compose/checkpoint.py`, with which the simulator reads a checkpoint's
shape as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from headway import ConfigError, ModelConfig, ModelError, ModelShape, checkpoint, hf_config

from . import ARCHITECTURES, architecture
from .checkpoints import find_checkpoint


@dataclass(frozen=True)
class ModelSpec:
    """A model before its weights."""

    shape: ModelShape
    directory: Path | None = None  # of the checkpoint and tokenizer; None: random weights, no tokenizer
    rope: hf_config.Rope = field(default_factory=hf_config.Rope)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: frozenset[int] = frozenset()
    random_weights: bool = False


def read_model(config: ModelConfig) -> ModelSpec:
    """The model that a `model` node names. Raises ModelError or ConfigError, before anything is loaded."""
    if config.load_format == "dummy" and config.has_shape:
        shape = config.shape()
        if shape.architecture not in ARCHITECTURES:
            architecture(shape.architecture)
        return ModelSpec(shape, qkv_bias=shape.architecture == "Qwen2ForCausalLM", random_weights=True)
    directory = find_checkpoint(config.name_or_path)
    if config.load_format == "dummy":
        return replace(_spec(directory, checkpoint.read(directory), config.dtype), random_weights=True)
    return read_config(directory, config.dtype)


def read_config(directory: Path, dtype: str | None = None) -> ModelSpec:
    """From a checkpoint directory's config.json, generation_config.json and the headers of its weights."""
    return _spec(directory, checkpoint.as_stored(checkpoint.read(directory), directory), dtype)


def _spec(directory: Path, found: hf_config.HFConfig, dtype: str | None) -> ModelSpec:
    try:
        architecture(found.shape["architecture"])
    except ModelError as error:
        raise ModelError(f"{directory / 'config.json'}: {error}") from None
    try:
        shape = ModelShape.from_fields(found.shape, dtype)
    except ConfigError as error:
        raise ModelError(f"checkpoint {directory}: {error}") from None
    return ModelSpec(
        shape,
        directory,
        rope=found.rope,
        qkv_bias=found.qkv_bias,
        o_bias=found.o_bias,
        mlp_bias=found.mlp_bias,
        eos_token_ids=found.eos_token_ids,
    )
