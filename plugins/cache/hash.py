"""Hash-chained prefix blocks."""

from __future__ import annotations

from dataclasses import dataclass

from headway import ROOT, Context, PrefixCache, Registry, Request, chain_key, hookimpl, root_key


@dataclass
class HashBlocks(PrefixCache):
    """A block's key is the hash of its parent's key and its own tokens (vLLM's automatic prefix caching).

    subtree: an eviction may take a block that others hang under, and takes them along, as the papers of
    FIFO-like evictions replay it; off, a block goes only after what hangs under it, as in vLLM and SGLang.

    Keys are the same in every process. A hit also compares the parent and the tokens, of a first block the
    salt: a collision is a miss.
    """

    subtree: bool = False

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._size = ctx.block_size
        self._by_key: dict[int, int] = {}
        # block -> key, parent (the salt for a first block), tokens
        self._content: dict[int, tuple[int, int | str, tuple[int, ...]]] = {}

    def match(self, request: Request, known: list[int], limit: int) -> list[int]:
        size, tokens, by_key, content = self._size, request.token_ids, self._by_key, self._content
        parent: int | str = known[-1] if known else request.cache_salt
        key = content[known[-1]][0] if known else root_key(request.cache_salt)
        found: list[int] = []
        for i in range(len(known), limit):
            run = tuple(tokens[i * size : (i + 1) * size])
            key = chain_key(key, run)
            block = by_key.get(key)
            if block is None or content[block] != (key, parent, run):
                break
            found.append(block)
            parent = block
        return found

    def insert(self, request: Request, parent: int, tokens: tuple[int, ...], block: int) -> int:
        salt = request.cache_salt
        content: tuple[int, int | str, tuple[int, ...]]
        if parent == ROOT:
            content = (chain_key(root_key(salt), tokens), salt, tokens)
        else:
            content = (chain_key(self._content[parent][0], tokens), parent, tokens)
        key = content[0]
        # After a collision the first block keeps the key and this one is never matched.
        twin = self._by_key.setdefault(key, block)
        if twin != block and self._content[twin] == content:
            return twin
        self._content[block] = content
        return block

    def remove(self, block: int) -> None:
        key = self._content.pop(block)[0]
        if self._by_key.get(key) == block:
            del self._by_key[key]


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("cache", "hash", HashBlocks)
