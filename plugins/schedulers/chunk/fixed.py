"""A fixed chunk."""

from __future__ import annotations

from dataclasses import dataclass

from headway import ChunkSize, Registry, Request, View, hookimpl, param


@dataclass
class FixedChunk(ChunkSize):
    """At most `chunk_size` tokens of one prompt in a step, under any scheduler (vLLM's
    long_prefill_token_threshold).

    A cap for each prompt, whatever else the step holds. Sarathi-Serve's token budget (OSDI'24,
    section 4.3) is one for the whole step, of which prompts get what decodes leave: that is scheduler=chunked
    with its token_budget.
    """

    chunk_size: int = param(512, min=1, max=2**31 - 1, unit="tokens")

    def tokens(self, request: Request, left: int, view: View) -> int:
        return min(left, self.chunk_size)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("chunk", "fixed", FixedChunk)
