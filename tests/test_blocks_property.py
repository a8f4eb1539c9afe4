"""BlockPool under any sequence of what the engine may do to it, for every eviction: counts add up and only
idle leaves go."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.policy_runs import REGISTRY
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from core.blocks import ROOT, BlockPool
from core.chains import prefix_keys
from core.context import Context, Truth
from core.errors import InvariantError, PolicyError
from core.inputs import Arrival, Tags
from core.policy import Eviction
from core.request import Request
from core.roster import publish

SIZE, BLOCKS = 2, 12
EVICTIONS = REGISTRY.names("eviction")
TOKENS = st.lists(st.integers(0, 1), min_size=SIZE, max_size=5 * SIZE)


class Watched(Eviction):
    """Passes everything on to an eviction policy and keeps its own account of what the core promises and of
    what it asks."""

    def __init__(self, inner: Eviction, subtree: bool) -> None:
        self.inner, self.pool, self.subtree = inner, None, subtree
        self.evictable: set[int] = set()
        self.known: set[int] = set()

    def setup(self, ctx: Context) -> None:
        self.inner.setup(ctx)

    def on_insert(self, block) -> None:
        assert block.id not in self.known and block.cached
        self.known.add(block.id)
        self.inner.on_insert(block)

    def on_hit(self, block) -> None:
        assert block.id in self.known and block.id not in self.evictable and block.hits > 0
        self.inner.on_hit(block)

    def on_evictable(self, block) -> None:
        assert block.id in self.known and block.id not in self.evictable and not block.ref_count
        assert self.subtree or not block.num_children
        self.evictable.add(block.id)
        self.inner.on_evictable(block)

    def on_in_use(self, block) -> None:
        self.evictable.remove(block.id)
        self.inner.on_in_use(block)

    def on_evict(self, block) -> None:
        self.evictable.discard(block.id)
        self.known.remove(block.id)
        self.inner.on_evict(block)

    def candidates(self, n: int):
        for block in self.inner.candidates(n):
            assert block.id in self.evictable, f"{block} is not evictable"
            yield block


class Pool(RuleBasedStateMachine):
    """Requests that match, allocate, publish, grow, give back, are pinned and dropped, in any order."""

    eviction = "lru"
    cache = "hash"
    subtree = False
    holding = Bundle("holding")
    pinned = Bundle("pinned")

    @initialize()
    def start(self) -> None:
        truth = Truth()
        truth.future = [Arrival(0.0, [0, 1] * 4), Arrival(1.0, [0, 0, 1, 1])]
        self.index = REGISTRY.get("cache", self.cache).build(subtree=self.subtree)
        self.watched = Watched(REGISTRY.get("eviction", self.eviction).build(), self.subtree)
        for role in (self.index, self.watched):
            role.setup(Context(0, SIZE, BLOCKS, 1 << 20, 8, 1 << 20, {}, truth=truth))
        self.pool = BlockPool(BLOCKS, SIZE, self.index, self.watched)
        self.count = 0
        self.held: list[Request] = []
        self.pins: list[tuple[int, ...]] = []
        self.wrote: dict[int, tuple[int, ...]] = {}  # block -> the prefix that was computed into it

    @rule(
        target=holding,
        tokens=TOKENS,
        salt=st.sampled_from(["", "s"]),
        category=st.sampled_from(["", "chat"]),
        turn=st.integers(0, 2),
    )
    def admit(self, tokens: list[int], salt: str, category: str, turn: int) -> Any:
        """Matches, takes what is cached and allocates the rest; published later or never."""
        self.count += 1
        self.pool.now += 0.5
        arrival = Arrival(
            self.pool.now, tokens, cache_salt=salt, tags=Tags(category=category, turn=turn, priority=turn)
        )
        request = Request(arrival, self.count - 1, max_model_len=1 << 20, eos_token_ids=frozenset())
        limit = len(tokens) // SIZE
        found = self.index.match(request, [], limit)
        for i, block in enumerate(found):
            assert self.wrote[block] == (salt, *tokens[: SIZE * (i + 1)]), (
                "a match must hold exactly the prompt's tokens"
            )
        idle = sum(1 for b in found if not self.pool.blocks[b].ref_count)
        if self.pool.num_available - idle < limit - len(found):
            return None
        self.pool.acquire(found, request.tags)
        self.watched.inner.on_admit(request, self.pool.now)
        new = self.pool.allocate(limit - len(found))
        for i, block in enumerate(new, len(found)):
            self.wrote[block] = (salt, *tokens[: SIZE * (i + 1)])
        request.block_table, request.num_published_blocks = found + new, len(found)
        request.published_parent = found[-1] if found else ROOT
        assert len(set(request.block_table)) == limit
        self.held.append(request)
        return request

    @rule(request=holding, share=st.floats(0, 1))
    def publish(self, request: Request | None, share: float) -> None:
        if request in self.held:
            publish(
                self.pool, request, max(request.num_published_blocks, round(share * len(request.block_table)))
            )

    @rule(request=holding)
    def give_back(self, request: Request | None) -> None:
        if request in self.held:
            self.held.remove(request)
            self.pool.release(
                [request.canonical_blocks[i] for i in sorted(request.canonical_blocks)], request.tags
            )
            self.pool.release(request.block_table, request.tags)

    @rule(target=pinned, request=holding)
    def pin(self, request: Request | None) -> Any:
        if request not in self.held:
            return None
        self.pins.append(
            self.pool.pin([request.canonical_blocks.get(i, b) for i, b in enumerate(request.block_table)])
        )
        return self.pins[-1]

    @rule(pin=pinned)
    def unpin(self, pin: tuple[int, ...] | None) -> None:
        for i, held in enumerate(self.pins):
            if held is pin:
                del self.pins[i]
                self.pool.unpin(held)
                break

    @rule(request=holding)
    def drop(self, request: Request | None) -> None:
        if request is not None and request not in self.held:
            self.pool.drop(request.block_table)

    @rule()
    def exhaust(self) -> None:
        """Everything available can be had at once, and everything cached and idle is evicted for it."""
        blocks = self.pool.allocate(self.pool.num_available)
        assert self.pool.num_available == 0 and self.pool.num_evictable == 0 and not self.watched.evictable
        self.pool.release(blocks)
        assert self.pool.num_free == len(blocks)

    @invariant()
    def holds(self) -> None:
        pool = self.pool
        pool.check()
        idle = {
            b.id for b in pool.blocks if b.cached and not b.ref_count and (self.subtree or not b.num_children)
        }
        assert self.watched.evictable == idle
        assert self.watched.known == {b.id for b in pool.blocks if b.cached}
        references = [id for r in self.held for id in (*r.block_table, *r.canonical_blocks.values())] + [
            id for p in self.pins for id in p
        ]
        assert all(b.ref_count == references.count(b.id) for b in pool.blocks)
        for block in pool.blocks:
            if block.cached:
                salt, *tokens = self.wrote[block.id]
                assert block.depth == len(tokens) // SIZE - 1
                assert block.key == list(prefix_keys(tokens, SIZE, salt))[-1]


@pytest.mark.parametrize("cache", ["hash", "radix"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_any_sequence_of_operations_keeps_the_rules(eviction: str, cache: str) -> None:
    machine = type("Pool", (Pool,), {"eviction": eviction, "cache": cache})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("cache", ["hash", "radix"])
@pytest.mark.parametrize("eviction", ["lru", "fifo", "sieve", "s3fifo", "two_q", "arc", "gdsf"])
def test_any_sequence_keeps_the_rules_where_blocks_go_with_what_hangs_under_them(
    eviction: str, cache: str
) -> None:
    machine = type("Pool", (Pool,), {"eviction": eviction, "cache": cache, "subtree": True})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def pool_of(eviction: Any, num_blocks: int = 4) -> BlockPool:
    index = REGISTRY.get("cache", "hash").build()
    for role in (index, eviction):
        role.setup(Context(0, 1, num_blocks, 64, 1, 64, {}))
    return BlockPool(num_blocks, 1, index, eviction)


def cached(pool: BlockPool, tokens: list[int]) -> list[int]:
    request = Request(Arrival(0.0, tokens), 0, max_model_len=64, eos_token_ids=frozenset())
    request.block_table = pool.allocate(len(tokens))
    publish(pool, request, len(tokens))
    pool.release(request.block_table)
    return request.block_table


class Planted(Eviction):
    """Yields what it is told to."""

    plugin_name = "eviction=planted"

    def __init__(self) -> None:
        self.answer: list[Any] = []

    def candidates(self, n: int):
        yield from self.answer


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nothing", "yielded nothing although 4 blocks"),
        ("parent", "cached children"),
        ("used", "referenced or pinned"),
        ("free", "not cached"),
    ],
)
def test_an_eviction_that_breaks_its_contract_is_named(what: str, says: str) -> None:
    planted = Planted()
    pool = pool_of(planted)
    table = cached(pool, [1, 2, 3, 4])
    if what == "parent":
        planted.answer = [pool.blocks[table[0]]]
    elif what == "used":
        pool.acquire(table)
        pool.release(table[3:])
        planted.answer = [pool.blocks[table[2]]]
    elif what == "free":
        pool.drop(table[3:])
        planted.answer = [pool.blocks[table[3]]]
        pool.allocate_one()
        pool.blocks[table[3]].ref_count = 0  # as if it had been given back behind the pool's back
    with pytest.raises(PolicyError, match=says) as error:
        pool.allocate_one()
    assert "planted" in str(error.value)


def test_releasing_twice_is_refused() -> None:
    pool = pool_of(REGISTRY.get("eviction", "lru").build())
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(InvariantError, match="more often"):
        pool.release(blocks)
