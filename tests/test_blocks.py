"""BlockPool: counts add up, eviction hears of exactly the unreferenced leaves, blocks know where they are in
their prefix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.blocks import ROOT, Block, BlockPool
from core.chains import chain_key, prefix_keys, root_key
from core.context import Context
from core.errors import PolicyError
from core.inputs import Arrival
from core.keyed import BlockHeap
from core.policy import Eviction
from core.request import Request
from core.roster import publish
from plugins.cache.hash import HashBlocks
from plugins.cache.radix import RadixTree


class Ledger(Eviction):
    """Keeps the set of evictable blocks as the callbacks tell it and evicts the one with the smallest id."""

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.evictable: dict[int, Block] = {}
        self.inserted = self.hit = self.evicted = 0

    def on_insert(self, block: Block) -> None:
        assert block.cached and block.ref_count and block.id not in self.evictable
        self.inserted += 1

    def on_hit(self, block: Block) -> None:
        assert block.cached and block.ref_count and block.id not in self.evictable
        self.hit += 1

    def on_evictable(self, block: Block) -> None:
        assert (
            block.cached and not block.ref_count and not block.num_children and block.id not in self.evictable
        )
        self.evictable[block.id] = block

    def on_in_use(self, block: Block) -> None:
        del self.evictable[block.id]

    def on_evict(self, block: Block) -> None:
        self.evicted += 1

    def candidates(self, n: int) -> Iterator[Block]:
        while self.evictable:
            yield self.evictable.pop(min(self.evictable))


def pool_of(num_blocks: int, size: int = 1, eviction: Eviction | None = None, cache=None) -> BlockPool:
    eviction, cache = eviction or Ledger(), cache or HashBlocks()
    for role in (cache, eviction):
        role.setup(Context(0, size, num_blocks, 1 << 20, 8, 1 << 20, {"cache": cache, "eviction": eviction}))
    return BlockPool(num_blocks, size, cache, eviction)


def request_of(tokens: list[int], index: int = 0, salt: str = "") -> Request:
    return Request(
        Arrival(0.0, tokens, cache_salt=salt), index, max_model_len=1 << 20, eos_token_ids=frozenset()
    )


def start(pool: BlockPool, request: Request) -> int:
    """Matches, acquires, allocates and publishes a prompt, as the engine does. Returns the hit blocks."""
    full = len(request.token_ids) // pool.block_size
    found = pool.cache.match(request, [], full)
    pool.acquire(found, request.tags)
    request.block_table = found + pool.allocate(full - len(found))
    request.num_published_blocks, request.published_parent = len(found), found[-1] if found else ROOT
    publish(pool, request, full)
    return len(found)


def stop(pool: BlockPool, request: Request) -> None:
    pool.release([request.canonical_blocks.pop(i) for i in sorted(request.canonical_blocks)])
    pool.release(request.block_table)
    request.block_table, request.num_published_blocks, request.published_parent = [], 0, ROOT


# ---- properties ------------------------------------------------------------------------------------------

PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(prompts=PROMPTS, num_blocks=st.integers(8, 24), size=st.integers(1, 3), data=st.data())
def test_counts_add_up_and_eviction_sees_exactly_the_unreferenced_leaves(
    prompts, num_blocks, size, data
) -> None:
    ledger = Ledger()
    pool = pool_of(num_blocks, size, ledger)
    running: list[Request] = []
    for i, tokens in enumerate(prompts):
        request = request_of(tokens, i)
        while running and len(tokens) // size > pool.num_available:
            stop(pool, running.pop(data.draw(st.integers(0, len(running) - 1), label="ends")))
        start(pool, request)
        running.append(request)
        pool.check()
        leaves = {b.id for b in pool.blocks if b.cached and not b.ref_count and not b.num_children}
        assert set(ledger.evictable) == leaves
        assert pool.num_free + pool.num_evictable + pool.num_used == num_blocks
    for request in running:
        stop(pool, request)
    pool.check()
    assert pool.num_used == 0
    assert ledger.inserted - ledger.evicted == pool.num_cached


# ---- what a block knows ----------------------------------------------------------------------------------


def test_a_block_records_parent_depth_hits_and_who_touched_it_last() -> None:
    pool = pool_of(8)
    first = request_of([1, 2, 3])
    start(pool, first)
    stop(pool, first)
    again = request_of([1, 2, 9], 1)
    assert start(pool, again) == 2
    a, b, c = (pool.blocks[i] for i in again.block_table)
    assert (a.parent, b.parent, c.parent) == (ROOT, a.id, b.id)
    assert (a.depth, b.depth, c.depth) == (0, 1, 2)
    assert (a.hits, b.hits, c.hits) == (1, 1, 0)
    assert b.num_children == 2


def test_a_parent_is_always_touched_after_its_child_so_that_the_tail_goes_first() -> None:
    pool = pool_of(4)
    request = request_of([1, 2, 3, 4])
    start(pool, request)
    stop(pool, request)
    touched = [block.last_access for block in pool.blocks]
    assert touched == sorted(touched, reverse=True)


def test_the_content_key_survives_eviction_and_tells_contents_apart() -> None:
    pool = pool_of(2)
    request = request_of([7, 8])
    start(pool, request)
    keys = [pool.blocks[i].key for i in request.block_table]
    assert keys == list(prefix_keys([7, 8], 1))
    stop(pool, request)
    other = request_of([5, 8], 1)
    start(pool, other)
    # the same tokens after another prefix
    assert keys[1] not in [pool.blocks[i].key for i in other.block_table]
    stop(pool, other)
    start(pool, request)
    assert [pool.blocks[i].key for i in request.block_table] == keys


def test_a_salt_gives_other_keys() -> None:
    assert (
        list(prefix_keys([1, 2], 1, "a")) != list(prefix_keys([1, 2], 1, "b")) != list(prefix_keys([1, 2], 1))
    )
    assert root_key("") == 0


def test_prefix_keys_cover_full_blocks_only() -> None:
    assert list(prefix_keys([1, 2, 3], 2)) == [chain_key(root_key(""), (1, 2))]


# ---- twins and pins --------------------------------------------------------------------------------------


def test_a_published_duplicate_keeps_its_own_copy_and_holds_the_twin() -> None:
    pool = pool_of(8)
    one, two = request_of([1, 2]), request_of([1, 2], 1)
    for request in (one, two):  # both computed the prompt before either was published
        request.block_table = pool.allocate(2)
    publish(pool, one, 2)
    publish(pool, two, 2)
    assert set(one.block_table).isdisjoint(two.block_table)
    assert two.canonical_blocks == dict(enumerate(one.block_table))
    assert [pool.blocks[i].ref_count for i in one.block_table] == [2, 2]
    assert not any(pool.blocks[i].cached for i in two.block_table)
    stop(pool, one)
    pool.check()
    assert pool.num_evictable == 0  # the twin is still held
    stop(pool, two)
    pool.check()
    assert (pool.num_evictable, pool.num_used) == (2, 0)


def test_pinned_blocks_are_not_evicted_until_unpinned() -> None:
    pool = pool_of(4)
    kept = request_of([1, 2])
    start(pool, kept)
    held = pool.pin(kept.block_table)
    stop(pool, kept)
    assert (pool.num_pinned, pool.num_available) == (2, 2)
    pool.allocate(2)
    assert pool.num_evictions == 0
    pool.unpin(held)
    assert (pool.num_pinned, pool.num_available) == (0, 2)


def test_drop_forgets_unreferenced_leaves_tail_first_and_spares_what_others_hold() -> None:
    pool = pool_of(8)
    one, two = request_of([1, 2, 3]), request_of([1, 9], 1)
    start(pool, one)
    start(pool, two)
    table = list(one.block_table)
    stop(pool, one)
    assert pool.drop(table) == 2  # block 1 is two's as well
    pool.check()
    assert pool.cache.match(request_of([1, 2, 3]), [], 3) == table[:1]


# ---- wrong use is refused --------------------------------------------------------------------------------


class Liar(HashBlocks):
    twin = 0

    def insert(self, request, parent, tokens, block):
        return self.twin


def test_a_cache_that_names_a_twin_that_is_not_cached_is_an_error() -> None:
    pool = pool_of(4, cache=Liar())
    request = request_of([1])
    request.block_table = pool.allocate(2)[1:]
    with pytest.raises(PolicyError, match="twin"):
        publish(pool, request, 1)


def test_a_match_of_an_uncached_block_is_caught() -> None:
    pool = pool_of(2)
    with pytest.raises(PolicyError, match="not cached"):
        pool.acquire(pool.allocate(1))


# ---- the heap that evictions share -----------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "discard", "pop"]), st.integers(0, 5), st.integers(0, 3)),
        max_size=200,
    )
)
def test_block_heap_is_a_sorted_list(operations) -> None:
    heap, model = BlockHeap(), {}  # model: block id -> (key, serial)
    blocks = [Block(i) for i in range(6)]
    for serial, (operation, id, key) in enumerate(operations):
        if operation == "push":
            heap.push(key, blocks[id])
            model[id] = (key, serial)
        elif operation == "discard":
            heap.discard(blocks[id])
            model.pop(id, None)
        else:
            expected = min(model, key=model.__getitem__, default=None)
            first = heap.peek()
            assert (first is None) == (expected is None)
            assert first is None or (first[0], first[1].id) == (model[expected][0], expected)
            popped = heap.pop()
            assert (popped.id if popped else None) == expected
            model.pop(expected, None)
        assert len(heap) == len(model)
        assert all((block in heap) == (block.id in model) for block in blocks)


def test_block_heap_forgets_stale_entries() -> None:
    heap, block = BlockHeap(), Block(0)
    for key in range(10_000):
        heap.push(key, block)
        heap.discard(block)
    assert len(heap._heap) < 200


@pytest.mark.parametrize("cache", [HashBlocks, RadixTree])
def test_both_indexes_leave_nothing_behind_when_everything_is_evicted(cache) -> None:
    index = cache()
    pool = pool_of(6, 2, cache=index)
    for i, tokens in enumerate(([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], [1, 2, 7, 7])):
        request = request_of(tokens, i)
        start(pool, request)
        stop(pool, request)
    pool.allocate(6)
    assert pool.num_cached == 0
    assert not any(index.match(request_of(t), [], 3) for t in ([1, 2, 3, 4, 5, 6], [1, 2, 7, 7, 0, 0]))
