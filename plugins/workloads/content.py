"""Token sequences named by an integer: the same id is always the same tokens, and two ids differ at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from random import Random
from typing import Any

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
        self._array: Any = None  # the same for numpy, once somebody asks
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

    def array(self, ids: Sequence[int], size: int) -> Any:
        """`size` tokens of each id, one after the other, as an array of 64-bit numbers."""
        import numpy as np

        if self._array is None:
            self._array = np.array(self._ring, np.int64)
        rest = np.array(ids, np.int64)
        if len(rest) and not 0 <= rest.min() <= rest.max() < IDS:
            raise ValueError(
                f"ids {rest.min()} to {rest.max()}: expected 0 to {IDS - 1}, or another's tokens would come"
            )
        out = np.empty((len(rest), size), np.int64)
        starts = (rest * 7919 % self._n).tolist()
        digits = min(self._digits, size)
        for place in range(digits):
            rest, out[:, place] = np.divmod(rest, self._n)
        for begin in range(digits, size, self._n):
            end = min(begin + self._n, size)
            for row, start in zip(out, starts, strict=True):
                row[begin:end] = self._array[start : start + end - begin]
        return out.reshape(-1)


class Prompt(Sequence[int]):
    """The first `length` tokens of several ids, `size` of each, and then of one more: made when somebody
    asks, as a list or as an array.

    What is kept is the ids, so a trace's prompts take no room before they run."""

    def __init__(
        self, content: Content, ids: Sequence[int], size: int, length: int, *, tail: int | None = None
    ) -> None:
        """`tail` names what the ids do not cover."""
        self._content, self._size, self._length, self._tail = content, size, length, tail
        self._ids = ids[: -(-length // size)]
        self._covered = len(self._ids) * size
        if tail is None and self._covered < length:
            raise ValueError(f"{len(ids)} ids of {size} tokens do not cover {length}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            place = range(self._length)[index]
            return self._tokens(place, place + 1)[0]
        start, stop, step = index.indices(self._length)
        return self._tokens(start, max(start, stop))[::step] if step > 0 else self.tolist()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.tolist() == list(other)

    def __repr__(self) -> str:
        return f"Prompt({self._length} tokens)"

    def tolist(self) -> list[int]:
        return self._tokens(0, self._length)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        made = self._content.array(self._ids, self._size)[: self._length]
        if self._tail is not None and self._covered < self._length:
            made = np.append(made, self._content.array((self._tail,), self._length - self._covered))
        return made if dtype is None else made.astype(dtype, copy=False)

    def _tokens(self, start: int, stop: int) -> list[int]:
        """Those of positions from `start` on, before `stop`."""
        first, made = start // self._size, []
        for id in self._ids[first : -(-stop // self._size)]:
            made += self._content.tokens(id, self._size)
        if self._tail is not None and stop > self._covered:
            made += self._content.tokens(self._tail, stop - self._covered)
            first = min(first, len(self._ids))
        return made[start - first * self._size : stop - first * self._size]


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
