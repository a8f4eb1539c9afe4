"""Prefix matches: what a waiting request would find in the cache, remembered across steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .blocks import BlockPool
from .calls import Calls
from .request import Request


class Match(NamedTuple):
    """Cached prefix of a waiting request, in whole blocks; the last prompt token is never part of it."""

    blocks: Sequence[int]
    num_tokens: int


class _Memo(NamedTuple):
    """The last match of a request, and what it rested on."""

    blocks: list[int]
    generations: list[int]
    version: int  # of the deepest block, or of the root: whether something was published under it since
    limit: int


class Matches:
    """Asks the prefix cache, and asks again only where the cache changed around the last answer."""

    def __init__(self, pool: BlockPool, calls: Calls) -> None:
        self._pool, self._calls = pool, calls
        self._memos: dict[int, _Memo] = {}  # by request index

    def match(self, request: Request) -> Match:
        """Cached prefix of a waiting request: O(1) while the cache did not change around it."""
        pool = self._pool
        if request.block_table:  # it runs, or drop_tail kept its head
            return Match((), request.num_computed_tokens)
        if not pool.cache.enabled:
            return Match((), 0)
        limit = pool.layout.num_full_blocks(request.num_tokens - 1)  # the last token is always computed
        known: list[int] = []
        if (memo := self._memos.get(request.index)) is not None:
            known = self._still_cached(memo)
            unchanged = len(known) == len(memo.blocks) and memo.version == self._version(known)
            if unchanged and limit == memo.limit:
                return Match(known, pool.layout.num_tokens(len(known)))
        if len(known) < limit:
            known = known + self._ask(request, known, limit)
        generations = [pool.blocks[block].generation for block in known]
        self._memos[request.index] = _Memo(known, generations, self._version(known), limit)
        return Match(known, pool.layout.num_tokens(len(known)))

    def content(self, request: Request) -> list[int]:
        """The blocks along all its tokens that the index holds: its own, and twins published before."""
        limit = self._pool.layout.num_full_blocks(len(request.token_ids))
        return self._calls.call(self._pool.cache, self._pool.cache.match, request, [], limit)

    def forget(self, request: Request) -> None:
        """It runs or has ended: nobody asks until it waits again."""
        self._memos.pop(request.index, None)

    def clear(self) -> None:
        self._memos.clear()

    def _still_cached(self, memo: _Memo) -> list[int]:
        """The deepest block that is still the one that was matched vouches for all before it, since ancestors
        of a cached block are cached."""
        blocks, n = self._pool.blocks, len(memo.blocks)
        while n and blocks[memo.blocks[n - 1]].generation != memo.generations[n - 1]:
            n -= 1
        return memo.blocks if n == len(memo.blocks) else memo.blocks[:n]

    def _version(self, known: list[int]) -> int:
        return self._pool.blocks[known[-1]].version if known else self._pool.root_version

    def _ask(self, request: Request, known: list[int], limit: int) -> list[int]:
        pool = self._pool
        found = self._calls.call(pool.cache, pool.cache.match, request, known, limit)
        fits = isinstance(found, list) and len(known) + len(found) <= limit
        if not fits or not all(map(pool.is_cached, found)):
            message = f"match() answered {found}: expected at most {limit - len(known)} cached blocks"
            raise self._calls.refusal(pool.cache, message, request)
        return found
