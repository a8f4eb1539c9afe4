"""Hash-chained prefix blocks."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import blake2b

from headway import ROOT, Context, PrefixCache, Request, hookimpl


@dataclass
class HashBlocks(PrefixCache):
    """A block's key is the hash of its parent's key and its own tokens (vLLM's automatic prefix caching).

    blake2b, so that keys are the same in every process. A hit also compares the parent and the tokens: a collision is a miss.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._size = ctx.block_size
        self._by_key: dict[bytes, int] = {}
        self._content: dict[int, tuple[bytes, int, tuple[int, ...]]] = {}  # block -> key, parent, tokens
        self._keys: dict[int, list[bytes]] = {}  # request index -> keys of its leading blocks, so that none is hashed twice

    def _key(self, request: Request, parent: bytes, tokens: tuple[int, ...]) -> bytes:
        return blake2b(array("q", tokens).tobytes(), digest_size=16, key=parent or request.cache_salt.encode()[:64]).digest()

    def match(self, request: Request, known: list[int], limit: int) -> list[int]:
        size, tokens = self._size, request.token_ids
        keys = self._keys.setdefault(request.index, [])
        parent = known[-1] if known else ROOT
        found: list[int] = []
        for i in range(len(known), limit):
            content = tuple(tokens[i * size : (i + 1) * size])
            while len(keys) <= i:
                j = len(keys)
                keys.append(self._key(request, keys[-1] if keys else b"", tuple(tokens[j * size : (j + 1) * size])))
            block = self._by_key.get(keys[i])
            if block is None or self._content[block][1:] != (parent, content):
                break
            found.append(block)
            parent = block
        return found

    def insert(self, request: Request, parent: int, tokens: tuple[int, ...], block: int) -> int:
        key = self._key(request, self._content[parent][0] if parent != ROOT else b"", tokens)
        twin = self._by_key.get(key)
        if twin is not None and self._content[twin][1:] == (parent, tokens):
            return twin
        if twin is None:  # after a collision the first block keeps the key and this one is never matched
            self._by_key[key] = block
        self._content[block] = (key, parent, tokens)
        return block

    def remove(self, block: int) -> None:
        key = self._content.pop(block)[0]
        if self._by_key.get(key) == block:
            del self._by_key[key]

    def on_finish(self, request: Request, now: float) -> None:
        self._keys.pop(request.index, None)


@hookimpl
def headway_register(registry):
    registry.add("cache", "hash", HashBlocks)
