"""Token sequences named by an integer: the same id is always the same tokens, and two ids differ at once."""

from __future__ import annotations

from random import Random


class Content:
    """Turns block or document ids into tokens at memory speed, since traces hold hundreds of millions of them.

    A sequence is the id's digits in base vocab_size, lowest first, then a piece of one fixed shuffle of the vocabulary.
    Ids below 2**40 therefore differ within the first few tokens (3 with a vocabulary of 151,936), and ids below
    vocab_size in the very first: blocks of a prefix cache tell them apart.
    """

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._n = vocab_size
        ring = list(range(vocab_size))
        Random(f"{seed}/content").shuffle(ring)
        self._ring = ring + ring
        self._digits = 1
        while vocab_size**self._digits < 1 << 40 and self._digits < 40:
            self._digits += 1

    def tokens(self, id: int, length: int) -> list[int]:
        """`length` token ids in [0, vocab_size)."""
        n, rest, out = self._n, id, []
        for _ in range(min(self._digits, length)):
            rest, digit = divmod(rest, n)
            out.append(digit)
        start = id * 7919 % n
        while (missing := length - len(out)) > 0:
            out += self._ring[start : start + min(missing, n)]
        return out
