"""How much of a trace's prompts a prefix cache could serve: exactly, for every capacity at once, from reuse
distances.

A request hits the leading blocks of its prompt that are cached when it comes, then touches all of its blocks,
tail first, so that the head of a prompt is the most recent. Under LRU a block is cached if fewer distinct
blocks than the cache holds were touched since its own last touch (Mattson et al., 1970): that number is its
reuse distance, and a block is a hit where no block before it in the prompt has one that is as large as the
capacity. Counting them all takes O(n log n).
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import HeadwayError

FIRST = -1  # in place of a place or a distance: the block was never touched before
MOST = 2**29  # blocks: places are numbers of 32 bits
PART = 2**13  # blocks that are looked at together, at least; a 64th of them all where that is more


@dataclass(frozen=True)
class Reuse:
    """What prefix caches of every size hit, weighted by prompt tokens."""

    num_blocks: int  # that prompts hold, in all
    num_distinct: int
    block_size: int  # tokens
    infinite: float  # hit rate of a cache that forgets nothing, cold at the start
    second_half: float  # the same, counted over the second half of the requests
    distances: Any  # how often a block was touched again with so many distinct blocks in between
    served: Any  # hit rate of an LRU cache of so many blocks; the last one is that of any larger cache

    def lru(self, capacity: int) -> float:
        """Hit rate of a cache of so many blocks under LRU."""
        return float(self.served[min(capacity, len(self.served) - 1)])

    @property
    def num_reused(self) -> int:
        """Touches of blocks that were touched before."""
        return int(self.distances.sum())

    def distance(self, percent: float) -> int:
        """Reuse distance that so many percent of the touches do not exceed, of those that had a touch before
        them."""
        import numpy as np

        upto = np.cumsum(self.distances)
        return int(np.searchsorted(upto, upto[-1] * percent / 100))


class ReuseLog:
    """The block ids of requests, in the order of a file: 4 bytes per block."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._ids = array("i")
        self._sizes = array("q")  # blocks of each request
        self._inputs = array("q")  # its tokens
        self.block_size = 0

    def add(self, input_len: int, ids: Sequence[Hashable] | None, block_size: int) -> None:
        """A request; without ids it shares nothing. An id that a prompt holds twice stands for another block
        the second time."""
        ids = ids or ()
        self.block_size = self.block_size or block_size
        if len(set(ids)) < len(ids):
            seen: dict[Hashable, int] = {}
            ids = [(id, _next(seen, id)) for id in ids]
        if len(self._ids) + len(ids) > MOST:
            raise HeadwayError(f"a trace of more than {MOST:,} blocks: measure a part of it (limit=REQUESTS)")
        number = self._numbers
        self._ids.extend(number.setdefault(id, len(number)) for id in ids)
        self._sizes.append(len(ids))
        self._inputs.append(input_len)

    def measured(self, order: Any) -> Reuse | None:
        """`order`: places of the requests by time. None where no request has blocks."""
        import numpy as np

        if not self._ids:
            return None
        ids, distinct = np.frombuffer(self._ids, np.int32), len(self._numbers)
        sizes, inputs = np.frombuffer(self._sizes, np.int64), np.frombuffer(self._inputs, np.int64)
        begins = np.cumsum(sizes) - sizes
        distances, served = np.zeros(distinct + 1, np.int64), np.zeros(distinct + 1, np.int64)
        prompts = (ids[begins[i] : begins[i] + sizes[i]] for i in order.tolist())
        late, half = 0, len(order) // 2
        for number, found in enumerate(reuse_distances(prompts, distinct, max(PART, len(ids) // 64))):
            known = found[found != FIRST]
            np.add.at(distances, known, 1)
            leading = len(found) if len(known) == len(found) else int(np.argmax(found == FIRST))
            # no block before it in its prompt may need more
            needed = np.maximum.accumulate(found[:leading]) + 1
            left = int(inputs[order[number]]) - np.arange(leading) * self.block_size
            np.add.at(served, needed, np.minimum(left, self.block_size))
            late += min(leading * self.block_size, int(inputs[order[number]])) if number >= half else 0
        total = int(inputs.sum())
        return Reuse(
            num_blocks=len(ids),
            num_distinct=distinct,
            block_size=self.block_size,
            infinite=_over(int(served.sum()), total),
            second_half=_over(late, int(inputs[order[half:]].sum())),
            distances=distances,
            served=np.cumsum(served) / max(1, total),
        )


def _next(seen: dict[Hashable, int], id: Hashable) -> int:
    seen[id] = seen.get(id, 0) + 1
    return seen[id]


def _over(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def reuse_distances(prompts: Iterator[Any], distinct: int, part: int = PART) -> Iterator[Any]:
    """Of each block of each prompt, the distinct blocks touched between its last touch and this prompt; FIRST
    without one.

    `prompts` are the numbers of their blocks below `distinct`, head first, none twice in a prompt. Touches
    have places 0, 1, ...; since place p there were as many touches as places, but those of a block that was
    touched since p before count for nothing. Their own last touch is later than p: how many they are is what
    `Earlier` counts.
    """
    import numpy as np

    last = np.full(distinct, FIRST, np.int32)  # place of each block's last touch
    earlier, waiting, blocks, place = Earlier(), [], 0, 0
    for prompt in prompts:
        waiting.append((place, last[prompt]))
        place += len(prompt)
        last[prompt] = np.arange(place - 1, place - 1 - len(prompt), -1, dtype=np.int32)  # tail first
        blocks += len(prompt)
        if blocks >= part:
            yield from _distances(waiting, earlier)
            waiting, blocks = [], 0
    if waiting:
        yield from _distances(waiting, earlier)


def _distances(waiting: list[tuple[int, Any]], earlier: Earlier) -> Iterator[Any]:
    """Of the blocks of some prompts: (place of the prompt's first touch, place of each block's last
    touch)."""
    import numpy as np

    asked = [own[own != FIRST] for _, own in waiting]
    repeated = earlier.later_than(asked)
    upto = np.cumsum([len(own) for own in asked])
    for (begin, own), own_repeated in zip(waiting, np.split(repeated, upto[:-1]), strict=True):
        found = np.full(len(own), FIRST, np.int32)
        known = own != FIRST
        found[known] = begin - own[known] - 1 - own_repeated
        yield found


class Earlier:
    """Of the groups of places that came before, how many are later than a place."""

    def __init__(self) -> None:
        self._seen: Any = None  # sorted

    def later_than(self, groups: Sequence[Any]) -> Any:
        """For each place of each group, how many places of earlier groups are greater. Places of other groups
        are others, unless the later group repeats what it has itself."""
        import numpy as np

        values = np.concatenate([np.empty(0, np.int32), *groups])
        sizes = np.array([len(group) for group in groups])
        group = np.repeat(np.arange(len(groups), dtype=np.int32), sizes)
        if self._seen is None:
            self._seen = np.empty(0, np.int32)
        counts = len(self._seen) - np.searchsorted(self._seen, values, side="right")
        # Groups in a row, each first asking and then told.
        order = np.argsort(np.concatenate([2 * group, 2 * group + 1]), kind="stable").astype(np.int32)
        asks = order < len(values)
        row = np.concatenate([values, values])[order]
        counts[order[asks]] += greater_before(row, asks)[asks]
        self._seen = np.concatenate([self._seen, np.sort(values)])
        self._seen.sort(kind="stable")  # two sorted runs: a merge
        return counts


def greater_before(values: Any, asks: Any) -> Any:
    """Of each value that asks, how many of those before it which do not ask are greater. No two that meet are
    equal.

    A merge sort from the top: positions in order of value are split again and again into halves of the row,
    and at each split the right half's questions count the left half's answers above them. O(n) per split, log
    n splits.
    """
    import numpy as np

    order = np.argsort(values, kind="stable").astype(np.int32)
    counts = np.zeros(len(values), np.int32)
    width = 1 << max(0, (len(values) - 1).bit_length() - 1) if len(values) else 0
    while width:
        left = order & width == 0
        _count(order, left, asks, width, counts=counts)
        order, width = _halved(order, left, width), width // 2
    return counts


def _count(order: Any, left: Any, asks: Any, width: int, counts: Any) -> None:
    """Adds what the questions in right halves find in the left ones. `order` holds one block of two halves
    after the other, each in order of value."""
    import numpy as np

    told = np.cumsum(left & ~asks[order], dtype=np.int32)
    at = np.flatnonzero(~left & asks[order]).astype(np.int32)
    ends = np.minimum(order[at] | (2 * width - 1), len(order) - 1)
    counts[order[at]] += told[ends] - told[at]


def _halved(order: Any, left: Any, width: int) -> Any:
    """Left halves before right ones. All blocks and halves but the last are full, so that their places are
    known."""
    import numpy as np

    halved = np.empty_like(order)
    for half in (left, ~left):
        chosen = order[half]
        begin = chosen & -width  # of the half: its positions are a range
        ranks = np.arange(len(chosen), dtype=np.int32)
        halved[begin + ranks - (chosen // (2 * width)) * width] = chosen
    return halved
