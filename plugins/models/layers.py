"""What the architectures share: linear layers, norms, attention, the decoder. Single-device code.

Module names are the checkpoint's, except that a PackedLinear holds several of its matrices in one:
`self_attn.qkv_proj` is q_proj, k_proj, v_proj and `mlp.gate_up_proj` is gate_proj, up_proj, stacked by output
rows. Sizes are read from attributes (`num_heads`, `num_kv_heads`, `parts`), so that a parallel plan can
change them from outside before the weights are loaded, and layers can be cut between `embed`, `run_layers`
and `finish`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from headway import ModelShape, hf_config

    from ..kernels.compose import Kernels
    from ..kernels.ops import BatchMetadata
    from .spec import ModelSpec

KVCache = tuple[Tensor, Tensor]  # keys and values of one layer, each [blocks, block_size, K, D]


class Linear(nn.Linear):
    """nn.Linear through the chosen kernel: a product(x, weight, bias)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, product: Callable[..., Tensor]
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, self.bias)


class PackedLinear(Linear):
    """Several projections of one input as one product. parts: checkpoint name -> output rows, in order."""

    def __init__(
        self, in_features: int, parts: dict[str, int], bias: bool, product: Callable[..., Tensor]
    ) -> None:
        super().__init__(in_features, sum(parts.values()), bias, product)
        self.parts = parts


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache."""

    def __init__(self, spec: ModelSpec, kernels: Kernels) -> None:
        super().__init__()
        shape = spec.shape
        self.num_heads, self.num_kv_heads, self.head_dim = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        )
        self.scale, self.eps = shape.head_dim**-0.5, shape.rms_norm_eps
        rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = PackedLinear(
            shape.hidden_size,
            {"q_proj": rows, "k_proj": kv_rows, "v_proj": kv_rows},
            spec.qkv_bias,
            kernels.linear,
        )
        # add_norm comes next
        self.o_proj: nn.Linear = Linear(rows, shape.hidden_size, spec.o_bias, kernels.linear_parts)
        self._store, self._attend = kernels.qk_norm_rope_store, kernels.attention

    def norm_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """Of queries and keys, [D] each; None where the architecture has no such norm."""
        return None, None

    def forward(
        self, hidden: Tensor, positions: Tensor, cos_sin: Tensor, cache: KVCache, batch: BatchMetadata
    ) -> Tensor:
        keys, values = cache
        q_weight, k_weight = self.norm_weights()
        q = self._store(
            self.qkv_proj(hidden),
            q_weight,
            k_weight,
            self.eps,
            positions,
            cos_sin,
            keys,
            values,
            batch.slot_mapping,
            self.num_heads,
            self.num_kv_heads,
        )
        out: Tensor = self.o_proj(self._attend(q, keys, values, batch, self.scale).flatten(1))
        return out


class GatedMLP(nn.Module):
    def __init__(self, spec: ModelSpec, kernels: Kernels) -> None:
        super().__init__()
        hidden, inner = spec.shape.hidden_size, spec.shape.intermediate_size
        self.gate_up_proj = PackedLinear(
            hidden, {"gate_proj": inner, "up_proj": inner}, spec.mlp_bias, kernels.gated_linear
        )
        self.down_proj: nn.Linear = Linear(inner, hidden, spec.mlp_bias, kernels.linear_parts)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_up_proj(hidden))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec, kernels: Kernels, attention: type[Attention]) -> None:
        super().__init__()
        size, eps = spec.shape.hidden_size, spec.shape.rms_norm_eps
        self.self_attn = attention(spec, kernels)
        self.mlp = GatedMLP(spec, kernels)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self._norm, self._add_norm = kernels.rms_norm, kernels.add_rms_norm

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin: Tensor,
        cache: KVCache,
        batch: BatchMetadata,
    ) -> tuple[Tensor, Tensor]:
        """hidden is the last layer's output, [T, N] or parts of it (`linear_parts`), not yet added to the
        residual stream; residual is None before the first layer."""
        before, after = self.input_layernorm, self.post_attention_layernorm
        if residual is None:
            residual, hidden = hidden, self._norm(hidden, before.weight, before.eps)
        else:
            hidden, residual = self._add_norm(hidden, residual, before.weight, before.eps)
        hidden = self.self_attn(hidden, positions, cos_sin, cache, batch)
        hidden, residual = self._add_norm(hidden, residual, after.weight, after.eps)
        return self.mlp(hidden), residual


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, spec: ModelSpec, kernels: Kernels, attention: type[Attention]) -> None:
        super().__init__()
        shape = spec.shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(spec, kernels, attention) for _ in range(shape.num_hidden_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self._add_norm = kernels.add_rms_norm
        self.cos_sin = torch.empty(0)  # float32 [max_position, D]; made by `bind`, when the device is known

    def run_layers(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        caches: Sequence[KVCache],
        batch: BatchMetadata,
    ) -> tuple[Tensor, Tensor | None]:
        """The layers that this decoder holds, all of them unless a pipeline cut it; caches: one per layer
        held."""
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, residual = layer(hidden, residual, positions, self.cos_sin, cache, batch)
        return hidden, residual

    def finish(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return self._add_norm(hidden, residual, self.norm.weight, self.norm.eps)[0]

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """`layers` by their class, which torch's list does not tell."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]


class CausalLM(nn.Module):
    """A decoder and its output head. An architecture names its attention class."""

    attention: type[Attention] = Attention

    def __init__(self, spec: ModelSpec, kernels: Kernels) -> None:
        super().__init__()
        self.spec = spec
        self.model = Decoder(spec, kernels, self.attention)
        self.lm_head = nn.Linear(spec.shape.hidden_size, spec.shape.vocab_size, bias=False)
        if spec.shape.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def bind(self, device: torch.device) -> None:
        """After the weights are on the device: makes the rotary table."""
        self.model.cos_sin = rotary_table(self.spec).to(device)

    def forward(
        self, tokens: Tensor, positions: Tensor, caches: Sequence[KVCache], batch: BatchMetadata
    ) -> Tensor:
        """tokens, positions int64 [T] -> hidden states [T, N], after the final norm."""
        hidden, residual = self.model.run_layers(
            self.model.embed_tokens(tokens), None, positions, caches, batch
        )
        return self.model.finish(hidden, residual)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, N] -> [S, V], in the model's dtype."""
        logits: Tensor = self.lm_head(hidden)
        return logits


def rotary_table(spec: ModelSpec) -> Tensor:
    """float32 [max_position, D] on the CPU: cosines, then sines, of every position."""
    positions = torch.arange(spec.shape.max_position_embeddings).float()
    angle = torch.outer(positions, _frequencies(spec.shape, spec.rope))
    return torch.cat((angle.cos(), angle.sin()), dim=-1).mul_(spec.rope.attention_factor)


def _frequencies(shape: ModelShape, rope: hf_config.Rope) -> Tensor:
    """float32 [D / 2]. Operations are in transformers' order: at position 100,000 a frequency's last bit
    moves an angle by 0.006."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    powers = shape.rope_theta**exponent
    frequency = 1.0 / powers
    match rope.rope_type:
        case "linear":
            return frequency / rope.factor
        case "llama3":
            return _llama3(frequency, rope)
        case "yarn":
            return _yarn(frequency, 1.0 / (rope.factor * powers), shape, rope)
    return frequency


def _llama3(frequency: Tensor, rope: hf_config.Rope) -> Tensor:
    """Llama 3.1's context extension: long wavelengths are stretched by `factor`, short ones kept, those
    between interpolated."""
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / frequency
    keep = (context / wavelength - low) / (high - low)
    between = (1 - keep) * frequency / rope.factor + keep * frequency
    stretched = torch.where(wavelength > context / low, frequency / rope.factor, between)
    return torch.where(wavelength < context / high, frequency, stretched)


def _yarn(frequency: Tensor, stretched: Tensor, shape: ModelShape, rope: hf_config.Rope) -> Tensor:
    """YaRN (arXiv 2309.00071): frequencies that turn often within the original context are kept."""

    def dimension(turns: float) -> float:
        """Of the frequency that turns so often within the original context."""
        original = rope.original_max_position_embeddings
        return shape.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(shape.rope_theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, shape.head_dim - 1)
    span = last - first or 0.001
    keep = 1 - ((torch.arange(shape.head_dim // 2, dtype=torch.float32) - first) / span).clamp(0, 1)
    return stretched * (1 - keep) + frequency * keep
