"""A fixed chunk."""

from __future__ import annotations

from dataclasses import dataclass

from headway import ConfigError, Context, Request, TokenBudget, View, hookimpl


@dataclass
class FixedChunk(TokenBudget):
    """At most `chunk_size` tokens of one prompt in a step (Sarathi-Serve, OSDI'24, section 4), under any scheduler."""

    chunk_size: int = 512

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        if self.chunk_size < 1:
            raise ConfigError(f"budget.chunk_size={self.chunk_size}: expected at least 1 token")

    def tokens(self, request: Request, left: int, view: View) -> int:
        return min(left, self.chunk_size)


@hookimpl
def headway_register(registry):
    registry.add("budget", "fixed", FixedChunk)
