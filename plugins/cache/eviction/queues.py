"""What evictions with several queues share: a queue of cached blocks, and the ghosts of evicted ones."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from headway import Block, BlockHeap


class Queue:
    """Cached blocks by position, smallest first. Only those that are `ready` can be taken, and only they are
    looked at.

    A block in use or with children keeps its place and costs nothing until it is evictable again: O(log n) a
    change.
    """

    __slots__ = ("_position", "_ready")

    def __init__(self) -> None:
        self._position: dict[int, Any] = {}  # block id -> its place; all members
        self._ready = BlockHeap()  # the evictable ones

    def __len__(self) -> int:
        return len(self._position)

    def __contains__(self, block: Block) -> bool:
        return block.id in self._position

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    def join(self, block: Block, position: Any) -> None:
        """Enters, or moves to another place. Not for a block that is ready."""
        self._position[block.id] = position

    def ready(self, block: Block) -> None:
        self._ready.push(self._position[block.id], block)

    def busy(self, block: Block) -> None:
        self._ready.discard(block)

    def leave(self, block: Block) -> None:
        del self._position[block.id]
        self._ready.discard(block)

    def take(self) -> Block | None:
        """The ready block at the smallest position, None without one. It remains a member but is no longer
        ready."""
        return self._ready.pop()


class Ghosts:
    """Content keys (`Block.key`) of evicted blocks, oldest first.

    The core evicts before it knows what the freed block will hold, so a ghost may be asked for only after the
    eviction that pushed it over the limit. `trim` is therefore called when a block is published, after
    `take`: the same as a cache that asks first.
    """

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def add(self, key: int) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)

    def take(self, key: int) -> bool:
        """Removes it; whether it was there."""
        if key not in self._keys:
            return False
        del self._keys[key]
        return True

    def trim(self, most: int) -> None:
        while len(self._keys) > max(0, most):
            self._keys.popitem(last=False)
