"""Belady's optimum, on the tree."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from headway import Block, ConfigError, Context, KeyEviction, Registry, Request, hookimpl, prefix_keys

NEVER = 1 << 60


@dataclass
class Belady(KeyEviction):
    """Belady (IBM Systems Journal 5(2), 1966): the block whose content is asked for last. Knows every prompt
    to come; leaves only, as the core asks.

    Optimal on a flat stream. On a tree a block is used no later than its children, so the leaf rule costs
    nothing while requests come one at a time. Needs a workload whose arrivals are known beforehand: no closed
    loop.
    """

    sees_truth = True
    requires = ("future",)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        assert ctx.truth is not None  # since it declares sees_truth = True
        self._truth, self._size, self._context = ctx.truth, ctx.block_size, ctx.max_model_len
        # content key -> indices of the arrivals that ask for it
        self._uses: dict[int, deque[int]] | None = None
        self._admitted = bytearray()  # by arrival index

    def _read_future(self) -> dict[int, deque[int]]:
        if not self._truth.future:
            raise ConfigError(
                "eviction=belady needs to know all arrivals beforehand: take a trace or an open-loop workload"
            )
        uses: dict[int, deque[int]] = {}
        for index, arrival in enumerate(self._truth.future):
            if len(arrival.prompt_token_ids) >= self._context:  # to be rejected: its tokens were not made
                continue
            for key in prefix_keys(arrival.prompt_token_ids, self._size, arrival.cache_salt):
                uses.setdefault(key, deque()).append(index)
        self._admitted = bytearray(len(self._truth.future))
        return uses

    def on_admit(self, request: Request, now: float) -> None:
        if self._uses is None:
            self._uses = self._read_future()
        if request.index < len(self._admitted):
            self._admitted[request.index] = 1

    def key(self, block: Block) -> Any:
        assert self._uses is not None  # since the first admission, before which no block is cached
        uses = self._uses.get(block.key)
        while uses and self._admitted[uses[0]]:
            uses.popleft()
        return (-(uses[0] if uses else NEVER), block.last_access)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("eviction", "belady", Belady)
