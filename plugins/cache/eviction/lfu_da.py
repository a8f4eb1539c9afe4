"""LFU with dynamic aging."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Block, Registry, hookimpl

from .aging import Aging


@dataclass
class LeastFrequentAged(Aging):
    """Fewest uses + L, where L is the value of the last victim (LFU-DA; Arlitt et al., SIGMETRICS PER 2000,
    section 4).

    Ties go to the block touched longest ago. libCacheSim's LFUDA adds L again at every hit, so hits there
    differ.
    """

    def worth(self, block: Block) -> float:
        return 1.0 + block.hits


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "lfu_da", LeastFrequentAged)
