"""What belongs to no role: model shapes, hardware and parallelism in numbers, and the engine's own limits.

A shape and a machine are enough to size a KV cache and to predict a step, with no checkpoint at hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import ConfigError, ModelError, near
from .hf_config import read_hf

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1}
GIB = 1 << 30


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with grouped-query attention and a gated MLP (Llama, Qwen2, Qwen3). Names are Hugging Face's."""

    architecture: str  # as in config.json: Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int  # tokens
    dtype: str = "bfloat16"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"model.dtype={self.dtype!r} is not known.{near(self.dtype, DTYPE_BYTES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"model.{field.name}={value}: expected at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} is no multiple of model.num_key_value_heads={self.num_key_value_heads}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], dtype: str | None = None) -> ModelShape:
        """From the contents of config.json; `dtype` goes before its own. ConfigError names a wrong field."""
        return cls.from_fields(read_hf(config).shape, dtype)

    @classmethod
    def from_fields(cls, given: Mapping[str, Any], dtype: str | None = None) -> ModelShape:
        """From what a checkpoint says (`HFConfig.shape`); without any dtype it is bfloat16."""
        return cls(**{**given, "dtype": dtype or given["dtype"] or "bfloat16"})

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of one layer that multiply activations: q, k, v, o, gate, up, down."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_parameters(self) -> int:
        """All weights of one layer, norms and biases included."""
        extra = 2 * self.hidden_size
        if self.architecture.startswith("Qwen3"):
            extra += 2 * self.head_dim  # norms of queries and keys
        if self.architecture.startswith("Qwen2"):
            extra += self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads)  # biases of q, k, v
        return self.layer_matrix_parameters + extra

    @property
    def embedding_parameters(self) -> int:
        """One vocabulary matrix: the input embedding, or the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * self.layer_parameters + tables * self.embedding_parameters + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in every layer."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * self.dtype_bytes

    @property
    def linear_flops_per_token(self) -> int:
        """Matrix products of all layers for one token: 2 FLOPs a weight. The output head counts only where a token is sampled."""
        return 2 * self.num_hidden_layers * self.layer_matrix_parameters

    @property
    def head_flops(self) -> int:
        """The output head for one sampled token."""
        return 2 * self.embedding_parameters

    @property
    def attention_flops_per_pair(self) -> int:
        """One query against one key and its value, all layers: 2 products of 2 FLOPs an element."""
        return 4 * self.num_hidden_layers * self.num_attention_heads * self.head_dim

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one sampled token that attends to `context` tokens, itself included."""
        return self.linear_flops_per_token + self.attention_flops_per_pair * context + self.head_flops


@dataclass
class ModelConfig:
    """The `model` node. Shape fields are optional: a checkpoint has its own; `executor=sim` and `load_format=dummy` need them."""

    name_or_path: str = "tiny"
    load_format: str = "auto"  # auto: read the checkpoint; dummy: random weights of this shape
    dtype: str | None = None  # None: the checkpoint's, else bfloat16
    architecture: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None

    def __post_init__(self) -> None:
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"model.load_format={self.load_format!r}: expected auto or dummy")

    @property
    def has_shape(self) -> bool:
        return self.hidden_size is not None

    def shape(self) -> ModelShape:
        """The shape of the checkpoint in a local directory, else what these fields describe. Raises ConfigError that names the missing ones."""
        directory = Path(os.path.expanduser(self.name_or_path))
        if self.load_format == "auto" and os.path.lexists(directory / "config.json"):
            try:
                found = checkpoint.read(directory)
                found = checkpoint.as_stored(found, directory) if checkpoint.has_weights(directory) else found
            except ModelError as error:
                raise ConfigError(str(error)) from None
            return ModelShape.from_fields(found.shape, self.dtype)
        given = {f.name: getattr(self, f.name) for f in fields(ModelShape) if getattr(self, f.name) is not None}
        if "num_key_value_heads" not in given and self.num_attention_heads is not None:
            given["num_key_value_heads"] = self.num_attention_heads
        if "head_dim" not in given and self.hidden_size is not None and self.num_attention_heads:
            given["head_dim"] = self.hidden_size // self.num_attention_heads
        optional = ("dtype", "rope_theta", "rms_norm_eps")
        missing = [f"model.{f.name}" for f in fields(ModelShape) if f.name not in given and f.name not in optional]
        if missing:
            raise ConfigError(
                f"the shape of model {self.name_or_path!r} is not known: set {', '.join(missing)}, "
                "choose a preset that has them (model=qwen3_8b), or give the path of a checkpoint"
            )
        return ModelShape(**given)


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its link to its neighbours. Peaks are the vendor's; the fractions say what kernels reach of them."""

    name: str = "h200"
    memory_gb: float = 139.8  # GiB that the driver reports as usable
    memory_bandwidth: float = 4.8e12  # bytes/s
    peak_flops: float = 989e12  # dense bf16 FLOP/s
    link_bandwidth: float = 450e9  # bytes/s to the neighbours, one direction
    link_latency: float = 8e-6  # seconds a collective or send takes at size zero
    bandwidth_fraction: float = 0.87  # achieved share of memory_bandwidth
    flops_fraction: float = 0.63  # achieved share of peak_flops
    link_fraction: float = 0.8  # achieved share of link_bandwidth
    step_overhead: float = 1e-4  # seconds of a step that neither bytes nor FLOPs explain: launches, sampling, synchronisation
    layer_overhead: float = 2.6e-5  # seconds of a layer that they do not explain: kernels that wait for each other

    def __post_init__(self) -> None:
        for name in ("memory_gb", "memory_bandwidth", "peak_flops", "link_bandwidth"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"hardware.{name}={getattr(self, name)}: expected a positive number")
        for name in ("bandwidth_fraction", "flops_fraction", "link_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"hardware.{name}={getattr(self, name)}: expected 0 < fraction <= 1")
        for name in ("link_latency", "step_overhead", "layer_overhead"):
            if getattr(self, name) < 0:
                raise ConfigError(f"hardware.{name}={getattr(self, name)}: expected seconds >= 0")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * GIB)


@dataclass
class ParallelConfig:
    """The `parallel` node: how many ranks share one model."""

    tp: int = 1  # tensor parallel: ranks that split every layer
    pp: int = 1  # pipeline parallel: stages of consecutive layers; as many plans are kept in flight
    layers: list[int] | None = None  # layers of each stage; None: as evenly as can be
    all_reduce: str = "library"  # NCCL or gloo; or symmetric: GPUs of one host read each other's memory
    overlap_tokens: int = 2048  # in steps of at least so many tokens, ranks share them between products; 0: never
    timeout: float = 15.0  # seconds without progress of a step after which a rank is taken to hang
    port: int = 0  # where ranks of one host meet; 0: any free one. torchrun has its own

    def __post_init__(self) -> None:
        for name in ("tp", "pp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)}: expected at least 1")
        if self.all_reduce not in ("library", "symmetric"):
            raise ConfigError(f"parallel.all_reduce={self.all_reduce!r}: expected library or symmetric")
        if self.overlap_tokens < 0:
            raise ConfigError(f"parallel.overlap_tokens={self.overlap_tokens}: expected at least 0")
        if not self.timeout > 0:
            raise ConfigError(f"parallel.timeout={self.timeout}: expected seconds > 0")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"parallel.port={self.port}: expected 0 to 65535")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp


@dataclass
class EngineConfig:
    """The engine's own limits; everything else belongs to a role."""

    block_size: int = 16  # tokens a KV block
    num_blocks: int | None = None  # None: as many as the executor's memory holds
    max_num_seqs: int = 256  # requests that may run at once
    max_num_batched_tokens: int = 8192  # tokens a step
    max_inflight: int = 1  # steps launched and not collected; 1 is synchronous
    max_model_len: int | None = None  # None: the model's own context
    check: bool = False  # verify the whole pool after every step (slow)

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_inflight", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"engine.{name}={value}: expected at least 1")
