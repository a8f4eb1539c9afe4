"""Shortest prompt first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headway import KeyOrder, Registry, Request, hookimpl


@dataclass
class ShortestPrompt(KeyOrder):
    """Fewest prompt tokens first, in tiers: a stricter `slo.tpot` goes first, no such SLO last.

    The order of prompts in SLAI (arXiv 2508.01002): plain shortest prompt first where all requests have one
    SLO, and that of its paying users where there are two.
    """

    may_starve = "short prompts may keep coming before a long one"

    def key(self, request: Request) -> tuple[float, int]:
        return (math.inf if request.slo.tpot is None else request.slo.tpot, request.num_prompt_tokens)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "spf", ShortestPrompt)
