"""Greedy-Dual-Size-Frequency eviction."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Block, Context, Registry, hookimpl, param

from .aging import Aging


@dataclass
class GreedyDual(Aging):
    """L + frequency * cost / size (GDSF; Cherkasova, HPL-98-69R1). Blocks have one size; cost is what
    recomputing a block takes.

    A token's linear layers cost the same anywhere, its attention grows with its context: cost = 1 + context /
    attention_tokens, where `attention_tokens` is the context at which attention costs as much as all else
    (about 32k for Llama-3.1-8B).
    """

    attention_tokens: int = param(32768, min=1, max=2**62, unit="tokens")

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._slope = ctx.block_size / self.attention_tokens

    def worth(self, block: Block) -> float:
        return (1 + block.hits) * (1.0 + block.depth * self._slope)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "gdsf", GreedyDual)
