"""What belongs to no role: model shapes, hardware and parallelism in numbers, and the engine's own limits.

A shape and a machine are enough to size a KV cache and to predict a step, with no checkpoint at hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelError
from ..measure.results import FILES
from . import checkpoint
from .hf_config import ARCHITECTURES, LLAMA, read_hf
from .memory import check_fits
from .params import check, param

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1}
GIB = 1 << 30
# of host memory for one KV block, measured; what indexes and evictions keep of it comes on top
BLOCK_BYTES = 340
#: What no model comes near: larger numbers are mistakes, and would be found only when memory is gone.
WIDEST, MOST_LAYERS, MOST_HEADS, LONGEST, MOST_RANKS = 2**24, 1000, 2**16, 2**24, 4096


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with grouped-query attention and a gated MLP (Llama, Qwen2, Qwen3). Names
    are Hugging Face's."""

    architecture: str  # as in config.json: Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM
    hidden_size: int = param(min=1, max=WIDEST)
    num_hidden_layers: int = param(min=1, max=MOST_LAYERS)
    num_attention_heads: int = param(min=1, max=MOST_HEADS)
    num_key_value_heads: int = param(min=1, max=MOST_HEADS)
    head_dim: int = param(min=1, max=MOST_HEADS)
    intermediate_size: int = param(min=1, max=WIDEST)
    vocab_size: int = param(min=1, max=WIDEST)
    tie_word_embeddings: bool = param()
    max_position_embeddings: int = param(min=1, max=LONGEST, unit="tokens")
    dtype: str = param("bfloat16", choices=tuple(DTYPE_BYTES))
    rope_theta: float = param(10000.0, above=0, max=1e12)
    rms_norm_eps: float = param(1e-6, min=0, max=1)

    def __post_init__(self) -> None:
        check(self, "model")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} is no multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
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
        attention = (
            self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        )
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_parameters(self) -> int:
        """All weights of one layer, norms and biases included."""
        extra = 2 * self.hidden_size
        family = ARCHITECTURES.get(self.architecture, LLAMA)
        if family.qk_norm:
            extra += 2 * self.head_dim
        if family.attention_bias == "qkv":
            extra += self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads)
        return self.layer_matrix_parameters + extra

    @property
    def embedding_parameters(self) -> int:
        """One vocabulary matrix: the input embedding, or the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        tables = 1 if self.tie_word_embeddings else 2
        return (
            self.num_hidden_layers * self.layer_parameters
            + tables * self.embedding_parameters
            + self.hidden_size
        )

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in every layer."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * self.dtype_bytes

    @property
    def linear_flops_per_token(self) -> int:
        """Matrix products of all layers for one token: 2 FLOPs a weight. The output head counts only where a
        token is sampled."""
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
    """The `model` node. Shape fields are optional: a checkpoint has its own; `executor=sim` and
    `load_format=dummy` need them."""

    name_or_path: str = "tiny"
    load_format: str = param(
        "auto",
        choices=("auto", "dummy"),
        doc="auto: read the checkpoint; dummy: random weights of this shape",
    )
    dtype: str | None = param(None, choices=tuple(DTYPE_BYTES), doc="None: the checkpoint's, else bfloat16")
    architecture: str | None = None
    hidden_size: int | None = param(None, min=1, max=WIDEST)
    num_hidden_layers: int | None = param(None, min=1, max=MOST_LAYERS)
    num_attention_heads: int | None = param(None, min=1, max=MOST_HEADS)
    num_key_value_heads: int | None = param(None, min=1, max=MOST_HEADS)
    head_dim: int | None = param(None, min=1, max=MOST_HEADS)
    intermediate_size: int | None = param(None, min=1, max=WIDEST)
    vocab_size: int | None = param(None, min=1, max=WIDEST)
    tie_word_embeddings: bool | None = None
    max_position_embeddings: int | None = param(None, min=1, max=LONGEST, unit="tokens")
    rope_theta: float | None = param(None, above=0, max=1e12)
    rms_norm_eps: float | None = param(None, min=0, max=1)

    def __post_init__(self) -> None:
        check(self, "model")

    @property
    def has_shape(self) -> bool:
        return self.hidden_size is not None

    def shape(self) -> ModelShape:
        """The shape of the checkpoint in a local directory, else what these fields describe. Raises
        ConfigError that names the missing ones."""
        directory = Path(os.path.expanduser(self.name_or_path))
        if self.load_format == "auto" and os.path.lexists(directory / "config.json"):
            try:
                found = checkpoint.read(directory)
                found = checkpoint.as_stored(found, directory) if checkpoint.has_weights(directory) else found
            except ModelError as error:
                raise ConfigError(str(error)) from None
            return ModelShape.from_fields(found.shape, self.dtype)
        given = {
            f.name: getattr(self, f.name) for f in fields(ModelShape) if getattr(self, f.name) is not None
        }
        if "num_key_value_heads" not in given and self.num_attention_heads is not None:
            given["num_key_value_heads"] = self.num_attention_heads
        if "head_dim" not in given and self.hidden_size is not None and self.num_attention_heads:
            given["head_dim"] = self.hidden_size // self.num_attention_heads
        optional = ("dtype", "rope_theta", "rms_norm_eps")
        missing = [
            f"model.{f.name}" for f in fields(ModelShape) if f.name not in given and f.name not in optional
        ]
        if missing:
            raise ConfigError(
                f"the shape of model {self.name_or_path!r} is not known: set {', '.join(missing)}, "
                "choose a preset that has them (`python run.py --help model` lists them), or give the path "
                "of a checkpoint"
            )
        return ModelShape(**given)


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its link to its neighbours. Peaks are the vendor's; the fractions say what kernels
    reach of them."""

    name: str = "h200"
    memory_gb: float = param(139.8, above=0, max=16384, unit="GiB", doc="that the driver reports as usable")
    memory_bandwidth: float = param(4.8e12, min=1, max=1e30, unit="bytes/s")
    peak_flops: float = param(989e12, min=1, max=1e30, unit="FLOP/s", doc="dense bf16")
    link_bandwidth: float = param(
        450e9,
        min=1,
        max=1e30,
        unit="bytes/s",
        doc="to the neighbours, one direction",
    )
    link_latency: float = param(
        8e-6,
        min=0,
        max=1000,
        unit="seconds",
        doc="of a collective or send at size zero",
    )
    bandwidth_fraction: float = param(0.87, min=1e-6, max=1, doc="achieved share of memory_bandwidth")
    flops_fraction: float = param(0.63, min=1e-6, max=1, doc="achieved share of peak_flops")
    link_fraction: float = param(0.8, min=1e-6, max=1, doc="achieved share of link_bandwidth")
    step_overhead: float = param(
        1e-4,
        min=0,
        max=1000,
        unit="seconds",
        doc="of a step that neither bytes nor FLOPs explain: launches, sampling, synchronisation",
    )
    layer_overhead: float = param(
        2.6e-5,
        min=0,
        max=1000,
        unit="seconds",
        doc="of a layer that they do not explain: kernels that wait for each other",
    )
    step_error: float | None = param(
        None,
        min=0,
        max=10,
        doc="relative error of predicted step times, as measured: 0.1 is 10%; None: never measured",
    )

    def __post_init__(self) -> None:
        check(self, "hardware")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * GIB)


@dataclass
class ParallelConfig:
    """The `parallel` node: how many ranks share one model. How they talk is the plugin's, which adds to
    this."""

    tp: int = param(1, min=1, max=MOST_RANKS, doc="tensor parallel: ranks that split every layer")
    pp: int = param(
        1,
        min=1,
        max=MOST_RANKS,
        doc="pipeline parallel: stages of consecutive layers; as many plans are kept in flight",
    )
    layers: list[int] | None = param(
        None,
        min=1,
        max=MOST_LAYERS,
        doc="of each stage; None: as evenly as can be",
    )

    def __post_init__(self) -> None:
        check(self, "parallel")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp


@dataclass
class EngineConfig:
    """The engine's own limits; everything else belongs to a role."""

    block_size: int = param(16, min=1, max=2**16, unit="tokens", doc="of a KV block")
    num_blocks: int | None = param(
        None,
        min=1,
        max=2**31 - 1,
        doc="None: as many as the executor's memory holds",
    )
    max_num_seqs: int = param(256, min=1, max=2**20, unit="requests", doc="that may run at once")
    max_num_batched_tokens: int = param(8192, min=1, max=2**24, unit="tokens", doc="of a step")
    max_inflight: int | None = param(
        None,
        min=1,
        max=MOST_RANKS,
        doc="steps launched and not collected; 1 is synchronous; None: what suits the executor, 2 on a GPU, "
        "at least pp",
    )
    max_model_len: int | None = param(
        None,
        min=1,
        max=LONGEST,
        unit="tokens",
        doc="None: the model's own context",
    )
    check: bool = False  # verify the whole pool after every step (slow)
    native: str = param(
        "auto",
        choices=("auto", "never", "always"),
        doc="auto: compiled, where that is built and all roles of the run have a twin; always: or not at all",
    )

    def __post_init__(self) -> None:
        check(self, "engine")
        check_fits(
            BLOCK_BYTES * (self.num_blocks or 0),
            f"engine.num_blocks={self.num_blocks}: keeping count of so many KV blocks",
            "set a smaller engine.num_blocks, or a larger engine.block_size",
        )


@dataclass(frozen=True)
class ResultsConfig:
    """What a run writes into its directory. result.json and the config are written always."""

    files: list[str] = param(list(FILES), choices=FILES)

    def __post_init__(self) -> None:
        check(self, "results")
