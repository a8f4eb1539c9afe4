"""Paused: requests that were set aside with their blocks. The first that memory pressure takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from .blocks import BlockPool
from .request import Request


class Paused:
    """Who is paused, in the order of pausing, and what that holds. Kept by `Roster`."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._requests: dict[int, Request] = {}  # by index

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def add(self, request: Request) -> None:
        self._requests[request.index] = request

    def remove(self, request: Request) -> None:
        del self._requests[request.index]

    def clear(self) -> None:
        self._requests.clear()

    def num_blocks(self, starting: Request | None = None, matched: Collection[int] = ()) -> int:
        """Blocks that come available when all with nothing in flight are taken, but for the one that starts
        and what it matched. A block that paused requests share comes with the last of them."""
        held: Counter[int] = Counter()
        for request in self._requests.values():
            if request is not starting and not request.num_steps_in_flight:
                held.update(request.block_table)
                held.update(request.canonical_blocks.values())
        for block in matched:
            held.pop(block, None)
        blocks = self._pool.blocks
        return sum(1 for block, count in held.items() if blocks[block].ref_count == count)
