"""hash and radix are two indexes over the same blocks: what one finds the other finds, and neither finds what
is not there."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from helpers.policy_runs import REGISTRY, compose, run

from core.blocks import ROOT, BlockPool
from core.chains import chain_key, prefix_keys, root_key
from core.compose.config import EngineConfig
from core.context import Context
from core.inputs import Arrival, SamplingParams, Tags
from core.policy import PrefixCache
from core.request import Request
from core.roster import publish
from headway import ConfigError
from plugins.cache import hash as hash_module

INDEXES = ("hash", "radix")


class Served:
    """A pool and an index, asked one request at a time."""

    def __init__(self, index: str, block_size: int = 2, num_blocks: int = 64) -> None:
        self.cache: PrefixCache = REGISTRY.get("cache", index).build()
        eviction = REGISTRY.get("eviction", "lru").build()
        for role in (self.cache, eviction):
            role.setup(Context(0, block_size, num_blocks, 1 << 20, 1, 1 << 20, {}))
        self.size = block_size
        self.pool = BlockPool(num_blocks, block_size, self.cache, eviction)
        self.asked = 0

    def request(self, tokens: list[int], salt: str = "") -> Request:
        self.asked += 1
        return Request(
            Arrival(0.0, tokens, cache_salt=salt),
            self.asked,
            max_model_len=1 << 20,
            eos_token_ids=frozenset(),
        )

    def match(self, tokens: list[int], salt: str = "", known: int = 0) -> list[int]:
        """Block ids for the prefix; the first `known` of them are given, as a memo of the core would."""
        request, limit = self.request(tokens, salt), len(tokens) // self.size
        found = self.cache.match(request, [], limit)
        return found if known == 0 else found[:known] + self.cache.match(request, found[:known], limit)

    def put(self, tokens: list[int], salt: str = "") -> list[int]:
        """Computes what is not cached and publishes it. Returns the request's blocks, which stay cached and
        unreferenced."""
        request = self.request(tokens, salt)
        found = self.cache.match(request, [], len(tokens) // self.size)
        self.pool.acquire(found)
        request.block_table = found + self.pool.allocate(len(tokens) // self.size - len(found))
        request.num_published_blocks, request.published_parent = len(found), found[-1] if found else ROOT
        publish(self.pool, request, len(request.block_table))
        self.pool.release(list(request.canonical_blocks.values()))
        self.pool.release(request.block_table)
        self.pool.check()
        return request.block_table


def conversations(seed: int, count: int = 40) -> list[Arrival]:
    """Prompts over two tokens that share, extend and branch, under three salts."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        base = rng.choice(prompts) if prompts and rng.random() < 0.7 else []
        prompts.append(
            (base[: rng.randint(0, len(base))] + [rng.randint(2, 3) for _ in range(rng.randint(1, 12))])[:40]
        )
    arrivals = []
    for i, prompt in enumerate(prompts):
        tags = Tags(
            rng.choice("ab"), rng.choice("xyz"), i % 3, rng.choice(["chat", "api"]), rng.randint(0, 2)
        )
        salt = rng.choice(["", "", "s"])
        arrivals.append(
            Arrival(
                0.02 * i, prompt, SamplingParams(max_tokens=8), rng.randint(1, 8), tags=tags, cache_salt=salt
            )
        )
    return arrivals


@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("eviction", REGISTRY.names("eviction"))
def test_both_make_the_same_decisions_under_any_eviction(eviction: str, block_size: int) -> None:
    config = EngineConfig(
        block_size=block_size,
        num_blocks=60 // block_size,
        max_num_seqs=3,
        max_num_batched_tokens=16,
        check=True,
    )
    for seed in range(4):
        one, other = (
            run(conversations(seed), cache=cache, eviction=eviction, engine=config) for cache in INDEXES
        )
        assert one.decision_hash == other.decision_hash
        assert [o.num_cached_tokens for o in one.outputs] == [o.num_cached_tokens for o in other.outputs]
        assert one.num_evictions > 0 and sum(o.num_cached_tokens for o in one.outputs) > 0


@pytest.mark.parametrize("index", INDEXES)
class TestAnIndex:
    def test_finds_the_longest_prefix_of_whole_blocks(self, index: str) -> None:
        served = Served(index)
        blocks = served.put([1, 2, 3, 4, 5, 6])
        assert served.match([1, 2, 3, 4, 5, 6, 7, 8]) == blocks
        assert served.match([1, 2, 3, 4, 5, 7]) == blocks[:2]
        assert served.match([1, 2, 3]) == blocks[:1]
        assert served.match([2, 2, 3, 4]) == []
        assert served.match([3, 4]) == []  # cached, but after other tokens

    def test_continues_from_what_is_known(self, index: str) -> None:
        served = Served(index)
        blocks = served.put(list(range(20)))
        for known in range(1, 10):
            assert served.match(list(range(20)), known=known) == blocks
            assert served.match(list(range(19)) + [99], known=min(known, 9)) == blocks[:9]

    def test_with_blocks_of_one_token_matches_tokens(self, index: str) -> None:
        served = Served(index, block_size=1)
        blocks = served.put([5, 5, 5, 6])
        assert served.match([5, 5, 5, 6, 7]) == blocks
        assert served.match([5, 5, 6]) == blocks[:2]
        assert len(set(served.put([5, 5, 6])) - set(blocks)) == 1

    def test_splits_where_prefixes_part(self, index: str) -> None:
        served = Served(index)
        one = served.put([1, 2, 3, 4, 5, 6, 7, 8])
        two = served.put([1, 2, 3, 4, 9, 9, 7, 8])
        three = served.put([1, 2, 9, 9])
        assert two[:2] == one[:2] and not set(two[2:]) & set(one)
        assert three[:1] == one[:1] and three[1] not in one + two
        for tokens, blocks in (
            ([1, 2, 3, 4, 5, 6, 7, 8], one),
            ([1, 2, 3, 4, 9, 9, 7, 8], two),
            ([1, 2, 9, 9], three),
        ):
            assert served.match(tokens) == blocks

    def test_forgets_leaves_and_keeps_what_is_above(self, index: str) -> None:
        served = Served(index)
        one, two = served.put([1, 2, 3, 4, 5, 6]), served.put([1, 2, 7, 8])
        assert served.pool.drop(one) == 2  # the shared head has a child left
        assert served.match([1, 2, 3, 4, 5, 6]) == one[:1]
        assert served.match([1, 2, 7, 8]) == two
        assert served.pool.drop(two) == 2
        assert served.match([1, 2, 7, 8]) == []
        again = served.put([1, 2, 3, 4])
        assert served.match([1, 2, 3, 4]) == again

    def test_names_the_twin_that_was_published_first(self, index: str) -> None:
        served = Served(index)
        tables = []
        for _ in range(2):  # both compute the same prompt at the same time
            request = served.request([1, 2, 3, 4])
            request.block_table = served.pool.allocate(2)
            tables.append(request)
        for request in tables:
            publish(served.pool, request, 2)
        assert (
            not tables[0].canonical_blocks
            and [tables[1].canonical_blocks[i] for i in range(2)] == tables[0].block_table
        )
        assert served.match([1, 2, 3, 4]) == tables[0].block_table
        assert served.pool.num_cached == 2

    def test_shares_within_a_salt_only(self, index: str) -> None:
        served = Served(index)
        plain, salted, other = (
            served.put([1, 2, 3, 4]),
            served.put([1, 2, 3, 4], "a"),
            served.put([1, 2, 3, 4], "b"),
        )
        assert len({*plain, *salted, *other}) == 6
        for salt, blocks in (("", plain), ("a", salted), ("b", other), ("c", [])):
            assert served.match([1, 2, 3, 4], salt) == blocks

    def test_gives_the_keys_that_a_prompt_predicts(self, index: str) -> None:
        served = Served(index)
        for salt in ("", "s"):
            blocks = served.put([1, 2, 3, 4, 5, 6], salt)
            assert [served.pool.blocks[b].key for b in blocks] == list(
                prefix_keys([1, 2, 3, 4, 5, 6, 7], 2, salt)
            )


def test_a_hash_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_module, "chain_key", lambda parent, tokens: sum(tokens) % 2)
    rng, served, trusted = random.Random(0), Served("hash", num_blocks=512), Served("radix", num_blocks=512)
    prompts = [[rng.randrange(4) for _ in range(2 * rng.randint(1, 4))] for _ in range(60)]
    where: dict[int, tuple[int, ...]] = {}  # block -> the prefix that it really holds
    for prompt in prompts:
        for i, block in enumerate(served.put(prompt)):
            assert where.setdefault(block, tuple(prompt[: 2 * i + 2])) == tuple(prompt[: 2 * i + 2])
        found = served.match(prompt)
        assert [where[b] for b in found] == [tuple(prompt[: 2 * i + 2]) for i in range(len(found))]
        trusted.put(prompt)
    hits = [(len(served.match(p)), len(trusted.match(p))) for p in prompts]
    assert all(ours <= all_ for ours, all_ in hits) and 0 < sum(h for h, _ in hits) < sum(h for _, h in hits)


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "from core.chains import prefix_keys; print(*prefix_keys(range(2000, 2040), 16), *prefix_keys([1, "
        "2], 1, 'salt'))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {
        " ".join(map(str, [*prefix_keys(range(2000, 2040), 16), *prefix_keys([1, 2], 1, "salt")])) + "\n"
    }
    assert root_key("") == 0 and root_key("a") != root_key("b")
    assert list(prefix_keys([1, 2, 3, 4, 5], 2)) == [
        chain_key(0, (1, 2)),
        chain_key(chain_key(0, (1, 2)), (3, 4)),
    ]


def test_nothing_is_shared_without_an_index() -> None:
    result = run(
        conversations(0),
        cache="none",
        engine=EngineConfig(block_size=2, num_blocks=40, max_num_seqs=3, check=True),
    )
    assert sum(o.num_cached_tokens for o in result.outputs) == 0 and result.num_evictions == 0


def test_composing_an_unknown_index_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match="radix"):
        compose(cache="radx")
