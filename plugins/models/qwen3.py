"""Qwen3: grouped-query attention with norms of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .layers import Attention, CausalLM, RMSNorm

if TYPE_CHECKING:
    from ..kernels.compose import Kernels
    from .spec import ModelSpec


class Qwen3Attention(Attention):
    def __init__(self, spec: ModelSpec, kernels: Kernels) -> None:
        super().__init__(spec, kernels)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        self.k_norm = RMSNorm(self.head_dim, self.eps)

    def norm_weights(self) -> tuple[Tensor, Tensor]:
        return self.q_norm.weight, self.k_norm.weight


class Qwen3ForCausalLM(CausalLM):
    attention = Qwen3Attention
