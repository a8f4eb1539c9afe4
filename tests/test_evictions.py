"""Evictions: the ones with a reference implementation agree with it hit for hit; each keeps the property that
it was published for."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import flat_stream
from helpers.flat_stream import EVICTIONS, hits, make, zipf
from helpers.policy_runs import Server, ask, compose, run
from hypothesis import given, settings
from hypothesis import strategies as st

from core.blocks import ROOT, Block, BlockPool
from core.chains import prefix_keys
from core.compose.config import EngineConfig
from core.context import Context, Truth
from core.errors import ConfigError
from core.inputs import Arrival, Tags
from core.request import Request
from core.roster import publish
from plugins.cache.hash import HashBlocks

REFERENCES = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu": "LFU",
    "two_q": "TwoQ",
    "sieve": "Sieve",
    "s3fifo": "S3FIFO",
    "arc": "ARC",
}


def libcachesim(name: str, capacity: int) -> Any:
    library = pytest.importorskip("libcachesim")
    return getattr(library, REFERENCES[name])(capacity, hashpower=14)


def ratio(answers: list[bool]) -> float:
    return sum(answers) / len(answers)


# ---- flat streams: every object one block ----------------------------------------------------------------


@pytest.mark.parametrize(("capacity", "alpha"), [(20, 0.9), (64, 0.8), (301, 1.0)])
@pytest.mark.parametrize("name", REFERENCES)
def test_agrees_with_libcachesim_hit_for_hit(name: str, capacity: int, alpha: float) -> None:
    stream = zipf(capacity, 4000, 800, alpha)
    ours = hits(make(name), capacity, stream)
    assert ours == flat_stream.reference(libcachesim(name, capacity), stream)
    assert 0.05 < ratio(ours) < 0.95


@pytest.mark.parametrize("name", REFERENCES)
@given(stream=st.lists(st.integers(0, 45), min_size=20, max_size=200))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_agrees_with_libcachesim_on_small_streams(name: str, stream: list[int]) -> None:
    # 20: the small queue of S3-FIFO holds 2
    assert hits(make(name), 20, stream) == flat_stream.reference(libcachesim(name, 20), stream)


def test_arc_learns_from_a_miss_before_it_makes_room_and_from_a_generated_block_when_it_is_published() -> (
    None
):
    """The two ways in which a ghost comes back: in the prompt of a request, or as the same tokens generated
    again."""
    for in_prompt in (True, False):
        arc = make("arc")
        arc.setup(Context(0, 1, 4, 64, 1, 64, {}))
        block = Block(0)
        block.key = next(prefix_keys([7], 1))
        arc.on_insert(block)
        arc.on_evict(block)
        assert arc.p == 0
        if in_prompt:
            arc.on_admit(Request(Arrival(0.0, [7]), 0, max_model_len=64, eos_token_ids=frozenset()), 0.0)
            assert arc.p == 1
        arc.on_insert(block)
        assert arc.p == 1  # once, not twice


@pytest.mark.parametrize("name", EVICTIONS)
@given(stream=st.lists(st.integers(0, 12), min_size=10, max_size=120), capacity=st.integers(1, 8))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_none_beats_belady(name: str, stream: list[int], capacity: int) -> None:
    best = sum(hits(make("belady"), capacity, stream))
    assert sum(hits(make(name), capacity, stream)) <= best


def test_belady_is_the_optimum_by_brute_force() -> None:
    def optimum(stream: list[int], held: frozenset[int], capacity: int) -> int:
        if not stream:
            return 0
        now, rest = stream[0], stream[1:]
        if now in held:
            return 1 + optimum(rest, held, capacity)
        if len(held) < capacity:
            return optimum(rest, held | {now}, capacity)
        return max(optimum(rest, held - {gone} | {now}, capacity) for gone in held)

    for seed in range(12):
        stream = zipf(seed, 13, 5, 0.3)
        assert sum(hits(make("belady"), 3, stream)) == optimum(stream, frozenset(), 3)


@pytest.mark.parametrize("name", ["slru", "two_q", "arc", "s3fifo", "sieve", "lfu", "lfu_da", "gdsf"])
def test_a_scan_does_not_flush_what_is_used_often(name: str) -> None:
    """Ten objects asked for twice a round, and between two rounds a scan of 15 that nobody asks for twice, in
    20 blocks."""
    stream: list[int] = []
    after: list[int] = []  # where the ten are asked for again after a scan
    for number in range(40):
        if number >= 20:
            after += range(len(stream), len(stream) + 10)
        stream += [*range(10), *range(10), *range(1000 + 15 * number, 1015 + 15 * number)]
    ours, lru = (hits(make(policy), 20, stream) for policy in (name, "lru"))
    assert ratio([lru[i] for i in after]) == 0.0
    assert ratio([ours[i] for i in after]) > 0.8


def test_mru_keeps_a_part_of_a_loop_that_lru_loses_whole() -> None:
    loop = list(range(30)) * 20
    assert ratio(hits(make("lru"), 25, loop)) == 0.0
    assert ratio(hits(make("mru"), 25, loop)) > 0.7


@pytest.mark.parametrize("name", ["lfu_da", "gdsf"])
def test_aging_lets_go_of_what_was_popular_once(name: str) -> None:
    """LFU holds on to ten objects that were hit fifty times, and has too little room for the fifteen of
    today."""
    stream = list(range(10)) * 50 + list(range(100, 115)) * 60
    today = slice(len(stream) - 150, None)
    assert ratio(hits(make("lfu"), 20, stream)[today]) < 0.75
    assert ratio(hits(make(name), 20, stream)[today]) == 1.0


def test_without_a_cost_that_grows_gdsf_is_lfu_da() -> None:
    stream = zipf(3, 4000, 600)
    assert hits(make("gdsf", attention_tokens=1 << 60), 80, stream) == hits(make("lfu_da"), 80, stream)


def test_slru_gives_the_protected_segment_its_share_only() -> None:
    """All twenty of yesterday are protected; with a share of one half only ten can keep today's out."""
    stream = list(range(20)) * 2 + list(range(100, 110)) * 10
    assert (
        ratio(hits(make("slru", protected_ratio=1.0), 20, stream)[-50:])
        < ratio(hits(make("slru", protected_ratio=0.5), 20, stream)[-50:])
        == 1.0
    )


# ---- on the tree -----------------------------------------------------------------------------------------


class Tree:
    """A pool of blocks of one token, so that a prompt is a path."""

    def __init__(
        self,
        eviction: Any,
        num_blocks: int,
        block_size: int = 1,
        future: list[Arrival] | None = None,
        *,
        subtree: bool = False,
    ) -> None:
        self.cache, self.eviction, self.size = HashBlocks(subtree=subtree), eviction, block_size
        truth = Truth()
        truth.future = future or []
        for role in (self.cache, eviction):
            role.setup(Context(0, block_size, num_blocks, 1 << 20, 8, 1 << 20, {}, truth=truth))
        self.pool = BlockPool(num_blocks, block_size, self.cache, eviction)
        self.asked = 0

    def ask(self, tokens: list[int], now: float = 0.0, **tags: Any) -> int:
        """Serves a prompt; returns how many of its blocks were cached."""
        request = Request(
            Arrival(now, tokens, tags=Tags(**tags)),
            self.asked,
            max_model_len=1 << 20,
            eos_token_ids=frozenset(),
        )
        self.asked += 1
        self.pool.now = max(self.pool.now, now)
        limit = len(tokens) // self.size
        found = self.cache.match(request, [], limit)
        self.pool.acquire(found, request.tags)
        self.eviction.on_admit(request, self.pool.now)
        request.block_table = found + self.pool.allocate(limit - len(found))
        request.num_published_blocks, request.published_parent = len(found), found[-1] if found else ROOT
        publish(self.pool, request, limit)
        self.pool.release(request.block_table, request.tags)
        self.pool.check()
        return len(found)

    def cached(self, tokens: list[int]) -> int:
        """How many leading blocks of a prompt are cached now."""
        request = Request(Arrival(0.0, tokens), 1 << 30, max_model_len=1 << 20, eos_token_ids=frozenset())
        return len(self.cache.match(request, [], len(tokens) // self.size))


@pytest.mark.parametrize(("name", "left"), [("fifo", (4, 0)), ("sieve", (4, 0)), ("lru", (4, 2))])
def test_with_subtrees_a_head_that_is_first_takes_its_tails_along(name: str, left: tuple[int, int]) -> None:
    """[1, 2, 3] was published first, and a block is needed: as leaves go, its tail does; else [1] with all
    under it, but for LRU."""
    found = []
    for subtree in (False, True):
        tree = Tree(make(name), 7, subtree=subtree)
        tree.ask([1, 2, 3])
        tree.ask([4, 5, 6, 7])
        tree.ask([8])
        found.append((tree.cached([4, 5, 6, 7]), tree.cached([1, 2, 3])))
    assert found == [(4, 2), left]


def test_with_subtrees_what_somebody_uses_stays() -> None:
    """[1] is in use, and with it all before it; the block behind it is not, and goes."""
    tree = Tree(make("fifo"), 4, subtree=True)
    tree.ask([1, 2, 3])
    used = tree.cache.match(
        Request(Arrival(0.0, [1, 2, 3]), 9, max_model_len=64, eos_token_ids=frozenset()), [], 2
    )
    tree.pool.acquire(used)
    tree.ask([4, 5])
    assert (tree.cached([1, 2, 3]), tree.cached([4, 5])) == (2, 2)


@pytest.mark.parametrize("name", EVICTIONS)
def test_goes_leaf_by_leaf_until_nothing_is_left(name: str) -> None:
    paths = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 7], [8, 9, 8]]
    tree = Tree(make(name), 10, future=[Arrival(0.0, p) for p in paths])
    for path in paths:
        tree.ask(path)
    assert tree.pool.num_cached == 10
    for left in range(9, -1, -1):
        block = tree.pool.allocate_one()
        assert tree.pool.num_cached == left
        tree.pool.check()  # raises for a cached block whose parent is not
        assert not tree.pool.blocks[block].cached


@pytest.mark.parametrize("name", EVICTIONS)
def test_never_takes_what_a_request_holds(name: str) -> None:
    tree = Tree(make(name), 8, future=[Arrival(0.0, [1, 2, 3, 4]), Arrival(0.0, [5, 6])])
    tree.ask([1, 2, 3, 4])
    tree.ask([5, 6])
    request = Request(Arrival(0.0, [1, 2, 3, 4]), 99, max_model_len=1 << 20, eos_token_ids=frozenset())
    held = tree.cache.match(request, [], 4)
    tree.pool.acquire(held)
    taken = tree.pool.allocate(tree.pool.num_available)
    assert len(taken) == 4 and not set(taken) & set(held) and tree.cached([1, 2, 3, 4]) == 4


def test_priority_evicts_the_least_urgent_first_and_the_oldest_among_equals() -> None:
    tree = Tree(make("priority"), 4)
    for token, priority in ((1, 0), (2, 2), (3, 1), (4, 2)):
        tree.ask([token], priority=priority)
    gone = []
    for _ in range(4):
        tree.pool.allocate_one()
        gone.append(next(t for t in (1, 2, 3, 4) if not tree.cached([t]) and t not in gone))
    assert gone == [2, 4, 3, 1]


@pytest.mark.parametrize("name", ["fifo", "sieve", "s3fifo", "two_q", "arc"])
def test_on_chains_of_prefixes_a_head_goes_after_all_that_hangs_under_it(name: str) -> None:
    """FIFO over all blocks would take the head first: it was published first, and never hit."""
    tree = Tree(make(name), 6)
    tree.ask([1, 2, 3])
    tree.ask([7, 8, 9])
    order = []
    for _ in range(6):
        before = {block.id: block.depth for block in tree.pool.blocks if block.cached}
        tree.pool.allocate_one()
        (gone,) = {block for block in before if not tree.pool.blocks[block].cached}
        order.append(before[gone])
    chains = [[depth for depth in order if depth == d] for d in (2, 1, 0)]
    assert [len(chain) for chain in chains] == [2, 2, 2] and order[0] == 2 and order[-1] == 0


def test_tlru_cuts_tails_that_fit_the_budget_before_it_touches_a_conversation() -> None:
    """xi - Q_hat = 3 tokens may be missing of each conversation: those go first, from both, although B is the
    older one."""
    tree = Tree(make("tlru", xi=5, Q_hat=2), 20)
    a, b = list(range(10)), list(range(100, 110))
    tree.ask(b)
    tree.ask(a)
    tree.pool.allocate(6)
    assert (tree.cached(a), tree.cached(b)) == (7, 7)
    tree.pool.allocate(4)  # nothing is safe any more: LRU
    assert (tree.cached(a), tree.cached(b)) == (7, 3)


def test_tlru_protects_the_block_in_which_what_is_needed_ends() -> None:
    """L = 64, 42 of them needed: block 3 is safe to evict, block 2 holds tokens 32 to 47. Then it is LRU, and
    b is older.
    """
    tree = Tree(make("tlru", xi=30, Q_hat=8), 8, block_size=16)
    a, b = list(range(100, 164)), list(range(64))
    tree.ask(b)
    tree.ask(a)
    left = []
    for _ in range(3):
        tree.pool.allocate_one()
        left.append((tree.cached(a), tree.cached(b)))
    assert left == [(4, 3), (3, 3), (3, 2)]


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("xi", [9, 30, 64])
def test_tlru_cuts_as_much_as_the_next_prefill_can_compute_and_no_more(size: int, xi: int) -> None:
    """A block is safe exactly if the next turn of Q_hat tokens, without it and what follows it, computes at
    most xi.
    """
    tree = Tree(make("tlru", xi=xi, Q_hat=8), 64, block_size=size)
    tree.ask(list(range(64)))
    tail = 64 // size - 1
    for depth in range(tail, -1, -1):
        block = tree.pool.blocks[depth]
        safe = not tree.eviction.key(block)[0]
        assert safe == (64 - depth * size + 8 <= xi)
        tree.pool.drop([depth])


def test_tlru_with_no_budget_is_lru() -> None:
    stream = zipf(4, 3000, 500)
    assert hits(make("tlru", xi=0, Q_hat=0), 60, stream) == hits(make("lru"), 60, stream)


def test_gdsf_values_a_deep_block_above_a_shallow_one() -> None:
    """Two leaves of the same age and use; recomputing the deep one attends over its whole prefix."""
    tree = Tree(make("gdsf", attention_tokens=4), 9)
    tree.ask([1, 2, 3, 4, 5, 6, 7, 8])
    tree.ask([9])
    tree.pool.allocate_one()
    assert (tree.cached([1, 2, 3, 4, 5, 6, 7, 8]), tree.cached([9])) == (8, 0)


def test_workload_aware_keeps_the_category_that_comes_back() -> None:
    """Chats come back after 0.7 s, API calls never do; LRU treats both alike and forgets a chat before its
    next turn."""
    served = {}
    for name in ("lru", "workload_aware"):
        tree, found = Tree(make(name), 40), 0
        for i in range(400):
            now = i * 0.1
            tree.ask([10_000 + i, 1, 2, 3, 4, 5], now, category="api")
            if i >= 7:
                found += tree.ask([20_000 + (i - 7), 1], now, category="chat")
            tree.ask([20_000 + i, 1], now, category="chat")
        served[name] = found / (2 * 393)
    assert served["lru"] == 0.0
    assert served["workload_aware"] > 0.8


def test_workload_aware_gives_up_a_block_that_is_late_for_its_category() -> None:
    """Between blocks of one category the one that is idle longest goes first."""
    tree = Tree(make("workload_aware"), 3)
    for now, token in ((0.0, 1), (1.0, 2), (2.0, 3), (3.0, 1)):
        tree.ask([token], now, category="chat")
    tree.ask([4], 4.0, category="chat")
    assert [tree.cached([t]) for t in (1, 2, 3)] == [1, 0, 1]


def test_belady_keeps_the_head_that_is_needed_and_cuts_what_is_not() -> None:
    future = [
        Arrival(float(i), tokens)
        for i, tokens in enumerate([[1, 2, 3], [4, 5, 6], [7, 8], [1, 2, 9], [4, 5, 6]])
    ]
    tree = Tree(make("belady"), 6, future=future)
    found = [tree.ask(arrival.prompt_token_ids) for arrival in future]
    assert found == [0, 0, 0, 2, 2]  # [3] and one of the two last needed leaves made room for [7, 8]


# ---- in a run --------------------------------------------------------------------------------------------

CONFIG = EngineConfig(block_size=4, num_blocks=24, max_num_seqs=2, check=True)


def prompts(seed: int) -> list[Arrival]:
    stream = zipf(seed, 120, 12, 0.9)
    return [
        ask(0.05 * i, [k * 10 + j for j in range(17)], 3, session=str(k), category="chat")
        for i, k in enumerate(stream)
    ]


def test_belady_learns_the_future_from_the_run_and_is_stamped_on_it() -> None:
    cached = {}
    for name in EVICTIONS:
        result = run(prompts(1), cache="radix", eviction=name, engine=CONFIG)
        cached[name] = sum(o.num_cached_tokens for o in result.outputs)
        assert result.saw_truth == (["eviction=belady"] if name == "belady" else [])
    assert cached["belady"] == max(cached.values()) > cached["lru"] > 0


def test_belady_without_a_known_future_says_what_to_choose() -> None:
    engine = compose(cache="hash", eviction="belady", engine=CONFIG)
    engine.add(ask(0.0, 8, 2))
    with pytest.raises(ConfigError, match="open-loop"):
        engine.run()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("slru", {"protected_ratio": 1.5}),
        ("two_q", {"kin": -0.1}),
        ("s3fifo", {"move_to_main_threshold": 0}),
        ("gdsf", {"attention_tokens": 0}),
        ("tlru", {"xi": -1}),
        ("workload_aware", {"smoothing": 0.0}),
    ],
)
def test_senseless_parameters_are_refused(name: str, bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        hits(make(name, **bad), 8, [1, 2])


# ---- time ------------------------------------------------------------------------------------------------


class Clocked(make("lru").__class__):
    """Notes its `now` in every callback."""

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.heard: list[tuple[str, float]] = []

    def on_insert(self, block: Block) -> None:
        self.heard.append(("insert", self.now))

    def on_hit(self, block: Block) -> None:
        self.heard.append(("hit", self.now))

    def on_evictable(self, block: Block) -> None:
        self.heard.append(("evictable", self.now))
        super().on_evictable(block)

    def on_in_use(self, block: Block) -> None:
        self.heard.append(("in use", self.now))
        super().on_in_use(block)

    def on_evict(self, block: Block) -> None:
        self.heard.append(("evict", self.now))

    def candidates(self, n: int):
        self.heard.append(("candidates", self.now))
        yield from super().candidates(n)


def test_an_eviction_knows_the_time_in_every_callback() -> None:
    """Steps of one second; the second request finds a block of the first, and the third takes what both
    left."""
    clocked = Clocked()
    arrivals = [ask(0.0, [1] * 5, 2), ask(10.0, [1] * 5, 2), ask(20.0, [2] * 30, 1)]
    engine = compose(
        cache="hash",
        server=Server(overhead=1.0, per_token=0.0),
        engine=EngineConfig(block_size=4, num_blocks=8, max_num_seqs=1),
    )
    type(engine)(engine.roles.given | {"eviction": clocked}, engine.config).run(arrivals)
    assert clocked.heard[:5] == [
        ("insert", 1.0),
        ("evictable", 2.0),
        ("in use", 10.0),
        ("hit", 10.0),
        ("evictable", 12.0),
    ]
    assert ("candidates", 20.0) in clocked.heard and ("evict", 20.0) in clocked.heard
