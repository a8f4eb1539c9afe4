"""A fixed chunk."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Request, TokenBudget, View, hookimpl, param


@dataclass
class FixedChunk(TokenBudget):
    """At most `chunk_size` tokens of one prompt in a step (Sarathi-Serve, OSDI'24, section 4), under any scheduler."""

    chunk_size: int = param(512, min=1, max=2**31 - 1, unit="tokens")

    def tokens(self, request: Request, left: int, view: View) -> int:
        return min(left, self.chunk_size)


@hookimpl
def headway_register(registry):
    registry.add("budget", "fixed", FixedChunk)
