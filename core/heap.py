"""A heap of blocks that can lose any of its members: what evictions are made of."""

from __future__ import annotations

import heapq
from typing import Any

from .blocks import Block


class BlockHeap:
    """Blocks by key, smallest first, ties in the order in which they came. What queue-based evictions are made of: a queue holds
    only its evictable blocks, each at the position it has in the paper's list, so that nothing ever walks over blocks in use.

    Entries of blocks that left before their turn are dropped lazily: every operation is O(log n), amortised.
    """

    __slots__ = ("_heap", "_entries", "_serial")

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Block]] = []
        self._entries: dict[int, tuple[Any, int, Block]] = {}  # block id -> its valid entry
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: Block) -> bool:
        return block.id in self._entries

    def push(self, key: Any, block: Block) -> None:
        """Adds the block, or moves it to another key."""
        self._serial += 1
        entry = self._entries[block.id] = (key, self._serial, block)
        heapq.heappush(self._heap, entry)

    def discard(self, block: Block) -> None:
        """Takes the block out; nothing happens if it is not in."""
        if self._entries.pop(block.id, None) is not None and len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def peek(self) -> tuple[Any, Block] | None:
        """The smallest key and its block, None if there is none."""
        heap, entries = self._heap, self._entries
        while heap:
            key, _, block = heap[0]
            if entries.get(block.id) is heap[0]:
                return key, block
            heapq.heappop(heap)
        return None

    def pop(self) -> Block | None:
        """Takes out the block with the smallest key, None if there is none."""
        heap, entries = self._heap, self._entries
        while heap:
            entry = heapq.heappop(heap)
            block = entry[2]
            if entries.get(block.id) is entry:
                del entries[block.id]
                return block
        return None
