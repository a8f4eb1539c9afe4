"""BlockPool: who holds which KV block. The only writer of reference counts, and the keeper of three rules:

  allocated + cached + free = total           after every operation
  only an unreferenced leaf may be evicted    so that a cached block's ancestors are always cached
  what a step in flight touches stays put     the engine releases blocks only after the step came back

A prefix cache is an index over these blocks and an eviction policy an order over them; neither can change a count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from .errors import InvariantError, PolicyError
from .request import Request, Tags

if TYPE_CHECKING:
    from .policy import Eviction, PrefixCache

ROOT = -1  # parent of a first block
NO_TAGS = Tags()


def root_key(cache_salt: str) -> int:
    """The key that first blocks of this salt hang under."""
    return int.from_bytes(blake2b(cache_salt.encode(), digest_size=7).digest(), "little") if cache_salt else 0


def chain_key(parent_key: int, tokens: tuple[int, ...]) -> int:
    """Identity of a block's content: its tokens and all before them, 64 bits.

    Python salts the hash of str and bytes, not that of ints and tuples, so the key is the same in every process. Two contents may share
    a key: whoever serves KV by it compares the tokens too.
    """
    return hash((parent_key, tokens))


def prefix_keys(token_ids: Sequence[int], block_size: int, cache_salt: str = "") -> Iterator[int]:
    """`Block.key` of each full block of a prompt, in order."""
    key = root_key(cache_salt)
    for end in range(block_size, len(token_ids) + 1, block_size):
        key = chain_key(key, tuple(token_ids[end - block_size : end]))
        yield key


class Block:
    """One KV block. Policies read these fields; the core writes them.

    last_access counts touches of the whole pool, so that it orders blocks strictly and needs no clock.
    Blocks of a request are released tail first, so a parent is always touched after its child.
    """

    __slots__ = (
        "id", "ref_count", "parent", "num_children", "depth", "cached", "key", "hits",
        "last_access", "last_access_time", "created", "created_time", "tags", "version", "generation",
    )  # fmt: skip

    def __init__(self, id: int) -> None:
        self.id = id
        self.ref_count = 0
        self.parent = ROOT
        self.num_children = 0
        self.depth = 0  # blocks before it in its prefix
        self.cached = False  # in the prefix index
        self.key = 0  # identity of its content while cached: outlives the id, which is used again after an eviction
        self.hits = 0  # times a request was given it as a prefix hit
        self.last_access = 0
        self.last_access_time = 0.0
        self.created = 0  # touch count when it was published
        self.created_time = 0.0
        self.tags: Tags = NO_TAGS  # of the request that last touched it
        self.version = 0  # grows when a child is published: a memoised match that ends here may be longer now
        self.generation = 0  # grows when the block is evicted: a memoised match that names it is shorter now

    def __repr__(self) -> str:
        return f"Block({self.id}, ref={self.ref_count}, parent={self.parent}, children={self.num_children}, cached={self.cached})"


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, a prefix index and an eviction order over them."""

    def __init__(self, num_blocks: int, block_size: int, cache: PrefixCache, eviction: Eviction) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InvariantError(f"a pool needs at least one block of one token, got {num_blocks} of {block_size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.cache, self.eviction = cache, eviction
        self.blocks: list[Block] = []  # made at first use, so that a large pool costs nothing to start
        self._free: list[int] = []
        self.num_cached = 0  # blocks in the index
        self.num_evictable = 0  # of those, unreferenced
        self.num_pinned = 0  # blocks held by pins alone or with others
        self._pins: dict[int, int] = {}  # block id -> pins on it
        self.num_evictions = 0
        self.evicted: list[int] = []  # since the step began; the decision log takes them
        self.root_version = 0
        self.now = 0.0
        self._touch = 0
        self._evicting = False

    def clear(self) -> None:
        """Forgets every block, as if nothing had ever run. Index and eviction order must be made anew with it (`Role.setup`)."""
        self.blocks.clear()
        self._free.clear()
        self._pins.clear()
        self.evicted.clear()
        self.num_cached = self.num_evictable = self.num_pinned = self.num_evictions = self._touch = 0
        self.root_version += 1
        self._evicting = False

    # ---- counts -------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self.num_blocks - len(self.blocks) + len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that an allocation could get: free ones and evictable ones."""
        return self.num_blocks - len(self.blocks) + len(self._free) + self.num_evictable

    @property
    def num_used(self) -> int:
        """Blocks that a request or a pin holds."""
        return self.num_blocks - self.num_available

    def is_cached(self, id: Any) -> bool:
        """Whether this is the number of a block that is in the prefix index."""
        return isinstance(id, int) and 0 <= id < len(self.blocks) and self.blocks[id].cached

    # ---- allocation ---------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each, evicting when short. The caller has checked `num_available`."""
        return [self.allocate_one() for _ in range(count)]

    def allocate_one(self) -> int:
        if self._free:
            block = self.blocks[self._free.pop()]
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
        eviction = self.eviction
        for id in block_ids:
            block = self.blocks[id]
            if not block.cached:
                raise PolicyError(f"matched block {id}, which is not cached", plugin=_name(self.cache))
            if block.ref_count == 0:
                self.num_evictable -= 1
                if block.num_children == 0:
                    eviction.on_in_use(block)
            block.ref_count += 1
            if hit:
                block.hits += 1
                self._touched(block, tags)
                eviction.on_hit(block)

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
                    if block.num_children == 0:
                        self.eviction.on_evictable(block)
                else:
                    self._free.append(id)

    def _touched(self, block: Block, tags: Tags) -> None:
        self._touch += 1
        block.last_access, block.last_access_time, block.tags = self._touch, self.now, tags

    # ---- the prefix index ---------------------------------------------------------------------------------------

    def publish(self, request: Request, upto: int) -> None:
        """Makes the request's full, computed blocks before index `upto` matchable. Called after the step that wrote them."""
        size, table, parent = self.block_size, request.block_table, request._parent
        key = root_key(request.cache_salt) if parent == ROOT else self.blocks[parent].key
        for index in range(request._published, upto):
            id = table[index]
            tokens = tuple(request.token_ids[index * size : (index + 1) * size])
            key = chain_key(key, tokens)
            canonical = self.cache.insert(request, parent, tokens, id)
            if canonical == id:
                self._cached(self.blocks[id], parent, key, request.tags)
            else:
                # Another request published the same content first. The table keeps its own copy (no table is ever
                # rewritten under a running kernel), and a reference on the twin keeps the prefix closed.
                if not self.is_cached(canonical) or self.blocks[canonical].parent != parent:
                    raise PolicyError(
                        f"insert() named block {canonical} as the twin of {id}, but no such block is cached under {parent}",
                        plugin=_name(self.cache),
                        request=request.id,
                    )
                self.acquire((canonical,), request.tags, hit=False)
                request._shadow[index] = canonical
            request._parent = parent = canonical
            request._published = index + 1

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
            if above.num_children == 0 and above.ref_count == 0:
                self.eviction.on_in_use(above)  # no longer a leaf
            above.num_children += 1
            above.version += 1
        self.num_cached += 1
        self.eviction.on_insert(block)

    def _evict(self) -> Block:
        if self._evicting:
            raise InvariantError("eviction called from inside an eviction")
        self._evicting = True
        try:
            candidates = self.eviction.candidates(1)
            if hasattr(candidates, "__iter__"):
                for block in candidates:
                    return self._evict_block(block)
        finally:
            self._evicting = False
        raise PolicyError(
            f"candidates() yielded nothing although {self.num_evictable} blocks are evictable, it answered {candidates!r}: "
            "track on_evictable and on_in_use, and yield every block between the two",
            plugin=_name(self.eviction),
        )

    def _evict_block(self, block: Block) -> Block:
        if not isinstance(block, Block) or not block.cached or block.ref_count or block.num_children:
            reason = "which is referenced or pinned" if getattr(block, "ref_count", 0) else "which has cached children or is not cached"
            raise PolicyError(
                f"candidates() yielded {block}, {reason}: yield only blocks between on_evictable and on_in_use",
                plugin=_name(self.eviction),
            )
        self.cache.remove(block.id)
        block.cached = False
        block.generation += 1
        self.num_cached -= 1
        self.num_evictable -= 1
        self.num_evictions += 1
        self.evicted.append(block.id)
        self.eviction.on_evict(block)
        if block.parent != ROOT:
            above = self.blocks[block.parent]
            above.num_children -= 1
            if above.num_children == 0 and above.ref_count == 0:
                self.eviction.on_evictable(above)
        return block

    # ---- pins (retention) ---------------------------------------------------------------------------------------

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
        """Forgets cached, unreferenced leaves among these, which lie along one prefix, at once (Retention "drop"); returns how many."""
        dropped = 0
        for id in reversed(block_ids):
            block = self.blocks[id]
            if block.cached and not block.ref_count and not block.num_children:
                self.eviction.on_in_use(block)
                self._evict_block(block)
                self._free.append(id)
                dropped += 1
        return dropped

    # ---- checks -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The whole pool against its rules: O(total), for tests and the conformance kit. Raises InvariantError."""
        used = [b for b in self.blocks if b.ref_count]
        cached = [b for b in self.blocks if b.cached]
        free = set(self._free)
        if len(free) != len(self._free):
            raise InvariantError("a block is on the free list twice")
        idle = [b for b in cached if not b.ref_count]
        if len(used) + len(idle) + self.num_free != self.num_blocks:
            raise InvariantError(f"allocated {len(used)} + cached {len(idle)} + free {self.num_free} != total {self.num_blocks}")
        if len(cached) != self.num_cached or len(idle) != self.num_evictable:
            raise InvariantError(f"counted {len(cached)} cached and {len(idle)} evictable, kept {self.num_cached} and {self.num_evictable}")
        children: dict[int, int] = {}
        for block in self.blocks:
            if block.ref_count < 0:
                raise InvariantError(f"{block} has a negative reference count")
            if block.id in free and (block.ref_count or block.cached):
                raise InvariantError(f"{block} is on the free list")
            if block.cached and block.parent != ROOT:
                above = self.blocks[block.parent]
                children[above.id] = children.get(above.id, 0) + 1
                if not above.cached:
                    raise InvariantError(f"{block} is cached but its parent {above} is not")
                if block.ref_count and not above.ref_count:
                    raise InvariantError(f"{block} is referenced but its parent {above} is not")
        for block in cached:
            if block.num_children != children.get(block.id, 0):
                raise InvariantError(f"{block} has {children.get(block.id, 0)} cached children")


def _name(role: object) -> str:
    return getattr(role, "plugin_name", type(role).__name__)
