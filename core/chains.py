"""What a prefix is called: keys of the contents of blocks, each with all that is before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b


def root_key(cache_salt: str) -> int:
    """The key that first blocks of this salt hang under."""
    return int.from_bytes(blake2b(cache_salt.encode(), digest_size=7).digest(), "little") if cache_salt else 0


def chain_key(parent_key: int, tokens: tuple[int, ...]) -> int:
    """Identity of a block's content: its tokens and all before them, 64 bits.

    Python salts the hash of str and bytes, not that of ints and tuples, so the key is the same in every
    process. Two contents may share a key: whoever serves KV by it compares the tokens too.
    """
    return hash((parent_key, tokens))


def prefix_keys(token_ids: Sequence[int], block_size: int, cache_salt: str = "") -> Iterator[int]:
    """`Block.key` of each full block of a prompt, in order."""
    key = root_key(cache_salt)
    for end in range(block_size, len(token_ids) + 1, block_size):
        key = chain_key(key, tuple(token_ids[end - block_size : end]))
        yield key
