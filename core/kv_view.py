"""What a policy reads of the pool of KV blocks."""

from __future__ import annotations

from .blocks import BlockPool


class KVView:
    """Block counts, read-only."""

    __slots__ = ("_pool", "total", "block_size")

    def __init__(self, pool: BlockPool) -> None:
        self._pool, self.total, self.block_size = pool, pool.num_blocks, pool.block_size

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
    def used(self) -> int:
        return self._pool.num_used

    @property
    def pinned(self) -> int:
        return self._pool.num_pinned
