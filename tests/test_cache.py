"""Prefix caches: `hash` and `radix` are two indexes with one behaviour; tokens decide, never a hash alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugins.cache.hash as hash_module
from core.blocks import ROOT, BlockPool
from core.compose.build import build_roles
from core.compose.config import EngineConfig
from core.compose.defaults import default_choices
from core.compose.hooks import load_registry
from core.context import Context
from core.engine import Engine
from core.inputs import Arrival, SamplingParams, Tags
from core.outputs import RunResult
from core.request import Request
from core.roster import publish
from core.testing.oracle import OracleExecutor
from plugins.cache.eviction.lru import LeastRecent
from plugins.cache.hash import HashBlocks
from plugins.cache.radix import RadixTree
from plugins.cache.radix import _common as common_prefix

REGISTRY = load_registry()
INDEXES = [HashBlocks, RadixTree]


class Served:
    """One index over a pool, with requests that come, publish their prompt and go."""

    def __init__(self, index, num_blocks: int = 64, size: int = 1) -> None:
        self.index, self.size = index, size
        eviction = LeastRecent()
        for role in (index, eviction):
            role.setup(
                Context(0, size, num_blocks, 1 << 20, 8, 1 << 20, {"cache": index, "eviction": eviction})
            )
        self.pool = BlockPool(num_blocks, size, index, eviction)
        self.count = 0

    def match(self, tokens: list[int], salt: str = "", known: list[int] | None = None) -> list[int]:
        request = self.request(tokens, salt)
        return self.index.match(request, known or [], len(tokens) // self.size)

    def request(self, tokens: list[int], salt: str = "") -> Request:
        self.count += 1
        return Request(
            Arrival(0.0, tokens, cache_salt=salt),
            self.count,
            max_model_len=1 << 20,
            eos_token_ids=frozenset(),
        )

    def serve(self, tokens: list[int], salt: str = "") -> list[int]:
        """Returns the table of a request that came and went."""
        request, pool = self.request(tokens, salt), self.pool
        full = len(tokens) // self.size
        found = self.index.match(request, [], full)
        pool.acquire(found)
        request.block_table = found + pool.allocate(full - len(found))
        request.num_published_blocks, request.published_parent = len(found), found[-1] if found else ROOT
        publish(pool, request, full)
        pool.release([request.canonical_blocks[i] for i in sorted(request.canonical_blocks)])
        pool.release(request.block_table)
        pool.check()
        return request.block_table


# ---- one behaviour ---------------------------------------------------------------------------------------

PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=10), st.sampled_from(["", "", "tenant"])), max_size=30
)


@settings(max_examples=150, deadline=None)
@given(prompts=PROMPTS, num_blocks=st.integers(10, 30), size=st.integers(1, 3))
def test_hash_and_radix_answer_every_match_alike(prompts, num_blocks, size) -> None:
    one, two = (Served(index(), num_blocks, size) for index in INDEXES)
    for tokens, salt in prompts:
        first, second = one.match(tokens, salt), two.match(tokens, salt)
        assert first == second
        for known in range(len(first) + 1):  # a memoised match goes on from any verified block
            assert (
                one.match(tokens, salt, first[:known])
                == two.match(tokens, salt, first[:known])
                == first[known:]
            )
        assert one.serve(tokens, salt) == two.serve(tokens, salt)


def run(seed: int, cache: str, eviction: str) -> RunResult:
    """A small engine under memory pressure; everything but the index is drawn from the seed."""
    rng = random.Random(seed)
    roles, _ = build_roles(REGISTRY, default_choices(cache=cache, eviction=eviction))
    roles["executor"] = OracleExecutor(num_blocks=rng.randint(10, 16))
    config = EngineConfig(
        block_size=rng.choice([1, 1, 2, 3]),
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_inflight=rng.choice([1, 2]),
        check=True,
    )
    arrivals, now = [], 0.0
    for _ in range(20):
        now += rng.choice([0, 0.01, 0.1])
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 10))]
        tags = Tags(category=rng.choice("ab"), turn=rng.randint(0, 2), priority=rng.randint(0, 2))
        arrivals.append(
            Arrival(
                now,
                prompt,
                SamplingParams(max_tokens=rng.randint(1, 6)),
                tags=tags,
                cache_salt=rng.choice(["", "", "x"]),
            )
        )
    return Engine(roles, config, seed=seed).run(arrivals)


# ---- matching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_longest_run_of_whole_blocks_is_found(index, size) -> None:
    served = Served(index(), size=size)
    tokens = list(range(100, 112))
    table = served.serve(tokens)
    for length in range(len(tokens) + 1):
        diverging = tokens[:length] + [0] * (12 - length)
        assert served.match(diverging) == table[: length // size]


@pytest.mark.parametrize("index", INDEXES)
def test_the_limit_is_kept(index) -> None:
    served = Served(index())
    table = served.serve([1, 2, 3, 4])
    request = served.request([1, 2, 3, 4])
    assert [served.index.match(request, [], limit) for limit in range(5)] == [
        table[:limit] for limit in range(5)
    ]


@pytest.mark.parametrize("index", INDEXES)
def test_the_same_block_after_another_prefix_is_another_block(index) -> None:
    served = Served(index(), size=2)
    served.serve([1, 1, 5, 5])
    assert served.match([2, 2, 5, 5]) == []
    assert served.match([5, 5]) == []


@pytest.mark.parametrize("index", INDEXES)
def test_salts_share_nothing(index) -> None:
    served = Served(index())
    a, b, c = served.serve([1, 2, 3], "alice"), served.serve([1, 2, 3], "bob"), served.serve([1, 2, 3])
    assert not set(a) & set(b) | set(a) & set(c) | set(b) & set(c)
    assert (served.match([1, 2], "alice"), served.match([1, 2], "bob"), served.match([1, 2])) == (
        a[:2],
        b[:2],
        c[:2],
    )
    assert served.match([1, 2], "carol") == []


@pytest.mark.parametrize("index", INDEXES)
def test_an_evicted_block_is_gone_and_its_id_may_hold_something_else(index) -> None:
    served = Served(index(), num_blocks=3)
    old = served.serve([1, 2, 3])
    new = served.serve([7, 8, 9])
    assert sorted(old) == sorted(new)
    assert served.match([1, 2, 3]) == []
    assert served.match([7, 8, 9]) == new


@pytest.mark.parametrize("index", INDEXES)
def test_only_a_cached_block_can_be_removed(index) -> None:
    served = Served(index())
    with pytest.raises(KeyError):
        served.index.remove(5)


# ---- hash: a collision is a miss -------------------------------------------------------------------------


@pytest.fixture
def colliding(monkeypatch) -> None:
    """Every content has the same hash."""
    monkeypatch.setattr(hash_module, "chain_key", lambda parent, tokens: 42)


def test_a_colliding_hash_is_a_miss_not_a_wrong_hit(colliding) -> None:
    served = Served(HashBlocks())
    table = served.serve([1])
    assert served.match([1]) == table
    assert served.match([2]) == []
    other = served.serve([2])  # published beside the first, which keeps the key
    assert other != table
    assert served.match([1]) == table
    assert served.match([2]) == []


def test_colliding_blocks_come_and_go_without_leaving_anything_behind(colliding) -> None:
    served = Served(HashBlocks(), num_blocks=4)
    for token in range(50):
        served.serve([token])
        served.serve([token, token + 1])
    served.pool.allocate(4)
    assert (served.index._by_key, served.index._content) == ({}, {})


def test_equal_tokens_under_colliding_parents_are_told_apart_by_the_parent(colliding) -> None:
    served = Served(HashBlocks())
    served.serve([1, 9])
    assert served.match([2, 9]) == []
    assert len(served.match([1, 9])) == 1  # the second block collided with the first, so it cannot be found


@pytest.mark.parametrize("eviction", ["lru", "lfu", "two_q"])
def test_collisions_cost_hits_and_nothing_else(colliding, eviction) -> None:
    for seed in range(8):
        assert [o.output_token_ids for o in run(seed, "hash", eviction).outputs] == [
            o.output_token_ids for o in run(seed, "none", eviction).outputs
        ]


# ---- radix: runs -----------------------------------------------------------------------------------------


def runs(tree: RadixTree) -> list[list[int]]:
    """Tokens of every edge, depth first."""
    found, pending = [], list(tree._roots.values())
    while pending:
        node = pending.pop(0)
        pending = list(node.children.values()) + pending
        if node.blocks:
            found.append(node.tokens)
    return found


def test_a_sequence_is_one_edge_however_it_was_published() -> None:
    served = Served(RadixTree(), size=2)
    for length in (2, 4, 8):
        served.serve(list(range(length)))
    assert runs(served.index) == [list(range(8))]


def test_an_edge_is_split_where_prompts_part_and_the_tail_keeps_its_children() -> None:
    served = Served(RadixTree())
    served.serve([1, 2, 3, 4, 5, 6])
    served.serve([1, 2, 3, 4, 9])
    served.serve([1, 2, 7])
    assert runs(served.index) == [[1, 2], [3, 4], [5, 6], [9], [7]]
    for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9], [1, 2, 7]):
        assert len(served.match(tokens)) == len(tokens)


def test_prompts_that_part_inside_a_block_share_no_part_of_it() -> None:
    served = Served(RadixTree(), size=4)
    table = served.serve([1, 2, 3, 4, 5, 6, 7, 8])
    assert served.match([1, 2, 3, 4, 5, 6, 0, 0]) == table[:1]
    assert served.serve([1, 2, 3, 4, 5, 6, 0, 0])[0] == table[0]
    assert runs(served.index) == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 0, 0]]


def test_a_block_with_descendants_cannot_be_removed() -> None:
    served = Served(RadixTree())
    first, second = served.serve([1, 2])
    with pytest.raises(KeyError, match="not a leaf"):
        served.index.remove(first)
    assert served.match([1, 2]) == [first, second]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_the_common_prefix_of_two_lists_that_differ(a, data) -> None:
    at = data.draw(st.integers(0, len(a) - 1))
    b = (
        a[:at]
        + [9]
        + data.draw(st.lists(st.integers(0, 3), min_size=len(a) - at - 1, max_size=len(a) - at - 1))
    )
    assert common_prefix(a, b) == at
