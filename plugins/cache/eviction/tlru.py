"""Tail-optimised LRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway import ROOT, Block, Context, KeyEviction, Registry, hookimpl, param


@dataclass
class TailOptimizedLRU(KeyEviction):
    """Of a conversation's L tokens, those beyond L + Q_hat - xi go first, then LRU (T-LRU; Zhang et al.,
    NeurIPS'25, arXiv 2510.15152).

    Also SGLang #34012. The next turn computes what is not cached, so a tail of xi - Q_hat tokens can be
    missing without a prefill above xi tokens: a block goes first if nothing of it lies before L + Q_hat - xi.
    L is where the conversation's last cached block ends; a block whose tail was evicted remembers it.
    """

    xi: int = param(
        1024,
        min=0,
        max=2**31 - 1,
        unit="tokens",
        doc="tokens that a prefill may compute within the TTFT target",
    )
    Q_hat: int = param(
        256,
        min=0,
        max=2**31 - 1,
        unit="tokens",
        doc="tokens that the next prompt is expected to add",
    )

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._size = ctx.block_size
        self._lengths: dict[int, int] = {}  # block id -> L, where the blocks behind it are gone

    def _length(self, block: Block) -> int:
        return self._lengths.get(block.id, (block.depth + 1) * self._size)

    def key(self, block: Block) -> Any:
        needed = block.depth * self._size < self._length(block) + self.Q_hat - self.xi
        return (needed, block.last_access)

    def on_hit(self, block: Block) -> None:
        self._lengths.pop(block.id, None)  # the conversation goes on from here

    def on_evict(self, block: Block) -> None:
        if block.parent != ROOT:  # of several conversations with this head, the longest needs it most
            self._lengths[block.parent] = max(self._lengths.get(block.parent, 0), self._length(block))
        self._lengths.pop(block.id, None)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "tlru", TailOptimizedLRU)
