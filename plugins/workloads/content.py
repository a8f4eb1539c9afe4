"""Token sequences named by an integer: the same id is always the same tokens, and two ids differ at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from random import Random

from headway import WorkloadError

from .numbers import MOST_TOKENS

IDS = 1 << 40  # ids that can be told apart; a trace of that many blocks fits no disk


class Content:
    """Turns block or document ids into tokens at memory speed, since traces hold hundreds of millions of
    them.

    A sequence is the id's digits in base vocab_size, lowest first, then a piece of one fixed shuffle of the
    vocabulary. Ids below 2**40 therefore differ within the first few tokens (3 with a vocabulary of 151,936),
    and ids below vocab_size in the very first: blocks of a prefix cache tell them apart. `Numbering` makes
    such ids of others.
    """

    def __init__(self, seed: int, vocab_size: int) -> None:
        if vocab_size < 2:
            raise WorkloadError(f"a vocabulary of {vocab_size} tells no prompts apart: expected 2 or more")
        self._n = vocab_size
        ring = list(range(vocab_size))
        Random(f"{seed}/content").shuffle(ring)
        self._ring = ring + ring
        self._digits = 1
        while vocab_size**self._digits < IDS:
            self._digits += 1

    def tokens(self, id: int, length: int) -> list[int]:
        """`length` token ids in [0, vocab_size)."""
        if not 0 <= id < IDS:
            raise ValueError(f"id {id}: expected 0 to {IDS - 1}, or another's tokens would come")
        n, rest, out = self._n, id, []
        for _ in range(min(self._digits, length)):
            rest, digit = divmod(rest, n)
            out.append(digit)
        start = id * 7919 % n
        while (missing := length - len(out)) > 0:
            out += self._ring[start : start + min(missing, n)]
        return out


class Numbering:
    """Numbers names of any kind in the order in which they are first seen: hashes of 64 bits become ids of
    Content."""

    def __init__(self, first: int = 0) -> None:
        self._known: dict[Hashable, int] = {}
        self._first = first

    def __call__(self, name: Hashable) -> int:
        return self._known.setdefault(name, self._first + len(self._known))

    @property
    def end(self) -> int:
        """The next number that is free."""
        return self._first + len(self._known)


def only_its_length(length: int) -> Sequence[int]:
    """A prompt that fits no context: the engine rejects it by its length, so its tokens are never made."""
    if length > MOST_TOKENS:
        raise WorkloadError(f"a prompt of {length:.3g} tokens: expected at most {MOST_TOKENS:,}")
    return range(length)
