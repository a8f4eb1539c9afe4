"""BlockPool: who holds which KV block. The only writer of reference counts, and the keeper of three rules:

  allocated + cached + free = total           after every operation
  only an unreferenced leaf may be evicted    so that a cached block's ancestors are always cached;
                                              `cache.subtree`: others too, with all under them
  what a step in flight touches stays put     the engine releases blocks only after the step came back

A prefix cache is an index over these blocks and an eviction policy an order over them; neither can change a
count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .audit import audit
from .calls import Calls
from .chains import chain_key, root_key
from .errors import InvariantError
from .inputs import Tags
from .request import Request
from .subtrees import Subtrees

if TYPE_CHECKING:
    from .policy import Eviction, PrefixCache

ROOT = -1  # parent of a first block
NO_TAGS = Tags()
_NOTHING: Any = object()


class Block:
    """One KV block. Policies read these fields; the core writes them.

    last_access counts touches of the whole pool, so that it orders blocks strictly and needs no clock.
    Blocks of a request are released tail first, so a parent is always touched after its child.
    """

    __slots__ = (
        "id", "ref_count", "parent", "num_children", "depth", "cached", "key", "hits", "last_access",
        "last_access_time", "created", "created_time", "tags", "version", "generation",
    )  # fmt: skip

    def __init__(self, id: int) -> None:
        self.id = id
        self.ref_count = 0
        self.parent = ROOT
        self.num_children = 0
        self.depth = 0  # blocks before it in its prefix
        self.cached = False  # in the prefix index
        # identity of its content while cached: outlives the id, which is used again after an eviction
        self.key = 0
        self.hits = 0  # times a request was given it as a prefix hit
        self.last_access = 0
        self.last_access_time = 0.0
        self.created = 0  # touch count when it was published
        self.created_time = 0.0
        self.tags: Tags = NO_TAGS  # of the request that last touched it
        self.version = 0  # grows when a child is published: a memoised match that ends here may be longer now
        self.generation = 0  # grows when the block is evicted: a memoised match that names it is shorter now

    def __repr__(self) -> str:
        return (
            f"Block({self.id}, ref={self.ref_count}, parent={self.parent}, children={self.num_children}, "
            f"cached={self.cached})"
        )


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How tokens lie in KV blocks: `block_size` of them in each."""

    block_size: int

    def num_blocks(self, num_tokens: int) -> int:
        """That hold so many tokens, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def num_full_blocks(self, num_tokens: int) -> int:
        return num_tokens // self.block_size

    def num_tokens(self, num_full_blocks: int) -> int:
        return num_full_blocks * self.block_size


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, a prefix index and an eviction order over them."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        cache: PrefixCache,
        eviction: Eviction,
        calls: Calls | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InvariantError(
                f"a pool needs at least one block of one token, got {num_blocks} of {block_size}"
            )
        self.num_blocks, self.block_size, self.layout = num_blocks, block_size, KVLayout(block_size)
        self.cache, self.eviction = cache, eviction
        self._calls = calls or Calls()
        self.blocks: list[Block] = []  # made at first use, so that a large pool costs nothing to start
        self.free_blocks: list[int] = []  # of those that were made
        self.num_cached = 0  # blocks in the index
        self.num_evictable = 0  # of those, unreferenced
        self.num_pinned = 0  # blocks held by pins alone or with others
        self._pins: dict[int, int] = {}  # block id -> pins on it
        self._whole, self._subtrees = cache.subtree, Subtrees()
        self.num_evictions = 0
        self._evicted: list[int] = []  # since `take_evicted`
        self.root_version = 0
        self._touch = 0
        self._evicting = False

    def clear(self) -> None:
        """Forgets every block, as if nothing had ever run. Index and eviction order must be made anew with it
        (`Role.setup`)."""
        self.blocks.clear()
        self.free_blocks.clear()
        self._pins.clear()
        self._evicted.clear()
        self._subtrees.clear()
        self.num_cached = self.num_evictable = self.num_pinned = self.num_evictions = self._touch = 0
        self.root_version += 1
        self._evicting = False

    @property
    def now(self) -> float:
        """Seconds on the run's clock; what an eviction policy reads as its own `now`."""
        return self.eviction.now

    @now.setter
    def now(self, now: float) -> None:
        self.eviction.now = now

    # ---- counts -------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self.num_blocks - len(self.blocks) + len(self.free_blocks)

    @property
    def num_available(self) -> int:
        """Blocks that an allocation could get: free ones and evictable ones."""
        return self.num_blocks - len(self.blocks) + len(self.free_blocks) + self.num_evictable

    @property
    def num_used(self) -> int:
        """Blocks that a request or a pin holds."""
        return self.num_blocks - self.num_available

    def is_cached(self, id: Any) -> bool:
        """Whether this is the number of a block that is in the prefix index."""
        return isinstance(id, int) and 0 <= id < len(self.blocks) and self.blocks[id].cached

    # ---- allocation ---------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each, evicting when short. The caller has checked
        `num_available`."""
        return [self.allocate_one() for _ in range(count)]

    def allocate_one(self) -> int:
        if self.free_blocks:
            block = self.blocks[self.free_blocks.pop()]
        elif len(self.blocks) < self.num_blocks:
            block = Block(len(self.blocks))
            self.blocks.append(block)
        else:
            block = self._evict()
        if block.ref_count or block.cached:
            raise InvariantError(f"{block} was handed out while in use")
        block.ref_count = 1
        return block.id

    def acquire(self, block_ids: Sequence[int], tags: Tags = NO_TAGS, *, hit: bool = True) -> None:
        """One more reference on cached blocks that a request was matched to."""
        call, eviction = self._calls.call, self.eviction
        for id in block_ids:
            block = self.blocks[id]
            if not block.cached:
                raise self._calls.refusal(self.cache, f"matched block {id}, which is not cached")
            if block.ref_count == 0:
                self.num_evictable -= 1
                if block.num_children == 0 or self._whole:
                    call(eviction, eviction.on_in_use, block)
            block.ref_count += 1
            if hit:
                block.hits += 1
                self._touched(block, tags)
                call(eviction, eviction.on_hit, block)

    def release(self, block_ids: Sequence[int], tags: Tags = NO_TAGS) -> None:
        """Gives one reference back on each, tail first, so that a prefix outlives what hangs under it."""
        for id in reversed(block_ids):
            block = self.blocks[id]
            if block.ref_count <= 0:
                raise InvariantError(f"{block} released more often than it was acquired")
            block.ref_count -= 1
            if block.cached:
                self._touched(block, tags)
            if block.ref_count == 0:
                if block.cached:
                    self.num_evictable += 1
                    if block.num_children == 0 or self._whole:
                        self._calls.call(self.eviction, self.eviction.on_evictable, block)
                else:
                    self.free_blocks.append(id)

    def _touched(self, block: Block, tags: Tags) -> None:
        self._touch += 1
        block.last_access, block.last_access_time, block.tags = self._touch, self.now, tags

    # ---- the prefix index ---------------------------------------------------------------------------------

    def publish(self, request: Request, parent: int, tokens: tuple[int, ...], id: int) -> int:
        """Makes a full, computed block of the request matchable after cached block `parent`, or ROOT.

        Returns the block that the index holds for this content: `id`, or a twin that another request
        published before. Its table keeps its own copy then (no table is ever rewritten under a running
        kernel), and a reference on the twin keeps the prefix closed.
        """
        cache = self.cache
        canonical = self._calls.call(cache, cache.insert, request, parent, tokens, id)
        if canonical == id:
            above = root_key(request.cache_salt) if parent == ROOT else self.blocks[parent].key
            self._cached(self.blocks[id], parent, chain_key(above, tokens), request.tags)
        elif self.is_cached(canonical) and self.blocks[canonical].parent == parent:
            self.acquire((canonical,), request.tags, hit=False)
        else:
            message = f"insert() named block {canonical} as the twin of {id}, but no such block is cached"
            message += f" under {parent}"
            raise self._calls.refusal(cache, message, request)
        return canonical

    def _cached(self, block: Block, parent: int, key: int, tags: Tags) -> None:
        block.cached, block.parent, block.key, block.num_children, block.hits = True, parent, key, 0, 0
        self._touched(block, tags)
        block.created, block.created_time = block.last_access, self.now
        if parent == ROOT:
            block.depth = 0
            self.root_version += 1
        else:
            above = self.blocks[parent]
            if not above.cached:
                raise InvariantError(f"{block} published under {above}, which is not cached")
            block.depth = above.depth + 1
            if self._whole:
                self._subtrees.add(parent, block.id)
            elif above.num_children == 0 and above.ref_count == 0:
                self._calls.call(self.eviction, self.eviction.on_in_use, above)  # no longer a leaf
            above.num_children += 1
            above.version += 1
        self.num_cached += 1
        self._calls.call(self.eviction, self.eviction.on_insert, block)

    def _evict(self) -> Block:
        if self._evicting:
            raise InvariantError("eviction called from inside an eviction")
        self._evicting = True
        call, eviction = self._calls.call, self.eviction
        try:
            candidates = call(eviction, eviction.candidates, 1)
            if hasattr(candidates, "__iter__"):
                first: Any = call(eviction, next, call(eviction, iter, candidates), _NOTHING)
                if first is not _NOTHING:
                    self._evict_below(first)
                    return self._evict_block(first)
        finally:
            self._evicting = False
        raise self._calls.refusal(
            eviction,
            f"candidates() yielded nothing although {self.num_evictable} blocks are evictable, it answered "
            f"{candidates!r}: track on_evictable and on_in_use, and yield every block between the two",
        )

    def _evict_below(self, root: Any) -> None:
        if self._whole and isinstance(root, Block) and not root.ref_count:
            # as unreferenced as the root, since requests hold whole prefixes
            for id in self._subtrees.below(root.id):
                self._forget(self.blocks[id])

    def _forget(self, block: Block) -> None:
        self._calls.call(self.eviction, self.eviction.on_in_use, block)
        self._evict_block(block)
        self.free_blocks.append(block.id)

    def _evict_block(self, block: Block) -> Block:
        if not isinstance(block, Block) or not block.cached or block.ref_count or block.num_children:
            in_use = getattr(block, "ref_count", 0)
            reason = "is referenced or pinned" if in_use else "has cached children or is not cached"
            mend = "yield only blocks between on_evictable and on_in_use"
            raise self._calls.refusal(self.eviction, f"candidates() yielded {block}, which {reason}: {mend}")
        call, eviction = self._calls.call, self.eviction
        call(self.cache, self.cache.remove, block.id)
        block.cached = False
        block.generation += 1
        self.num_cached -= 1
        self.num_evictable -= 1
        self.num_evictions += 1
        self._evicted.append(block.id)
        call(eviction, eviction.on_evict, block)
        if block.parent != ROOT:
            above = self.blocks[block.parent]
            above.num_children -= 1
            if self._whole:
                self._subtrees.remove(block.parent, block.id)
            elif above.num_children == 0 and above.ref_count == 0:
                call(eviction, eviction.on_evictable, above)
        return block

    # ---- pins (retention) ---------------------------------------------------------------------------------

    def pin(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        """Keeps cached blocks from eviction until `unpin`; blocks that are not cached are left out."""
        held = tuple(id for id in block_ids if self.blocks[id].cached)
        self.acquire(held, hit=False)
        for id in held:
            self._pins[id] = self._pins.get(id, 0) + 1
        self.num_pinned = len(self._pins)
        return held

    def unpin(self, held: Sequence[int], tags: Tags = NO_TAGS) -> None:
        for id in held:
            self._pins[id] -= 1
            if not self._pins[id]:
                del self._pins[id]
        self.num_pinned = len(self._pins)
        self.release(held, tags)

    def drop(self, block_ids: Sequence[int]) -> int:
        """Forgets cached, unreferenced leaves among these, which lie along one prefix, at once (Retention
        "drop"); returns how many."""
        dropped = 0
        for id in reversed(block_ids):
            block = self.blocks[id]
            if block.cached and not block.ref_count and not block.num_children:
                self._forget(block)
                dropped += 1
        return dropped

    def take_evicted(self) -> list[int]:
        """Blocks evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    # ---- checks -------------------------------------------------------------------------------------------

    check = audit
