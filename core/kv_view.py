"""What a policy reads of the pool of KV blocks."""

from __future__ import annotations

from .blocks import BlockPool
from .paused import Paused


class KVView:
    """Block counts, read-only."""

    __slots__ = ("_pool", "_paused", "total", "block_size")

    def __init__(self, pool: BlockPool, paused: Paused) -> None:
        self._pool, self._paused, self.total, self.block_size = pool, paused, pool.num_blocks, pool.block_size

    @property
    def free(self) -> int:
        return self._pool.num_free

    @property
    def evictable(self) -> int:
        return self._pool.num_evictable

    @property
    def available(self) -> int:
        return self._pool.num_available

    @property
    def paused(self) -> int:
        """Blocks beside the available ones that paused requests would give: O(their blocks)."""
        return self._paused.num_blocks()

    @property
    def used(self) -> int:
        return self._pool.num_used

    @property
    def pinned(self) -> int:
        return self._pool.num_pinned
