"""Drives a block pool as a plain cache: one block an object, requested one after the other, as libCacheSim
does."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate

from core.blocks import BlockPool
from core.compose.hooks import load_registry
from core.context import Context, Truth
from core.inputs import Arrival
from core.policy import Eviction, Role
from core.request import Request
from core.roster import publish
from plugins.cache.hash import HashBlocks

REGISTRY = load_registry()
EVICTIONS = REGISTRY.names("eviction")


def make(name: str, **parameters) -> Eviction:
    return REGISTRY.get("eviction", name).build(**parameters)


def hits(eviction: Eviction, capacity: int, objects: Sequence[int], *, check: bool = False) -> list[bool]:
    """Hit or miss of every request. A miss evicts if the cache is full, then inserts."""
    arrivals = [Arrival(float(i), [key]) for i, key in enumerate(objects)]
    truth = Truth()
    truth.future = arrivals
    cache = HashBlocks()
    for role in (cache, eviction):
        role.setup(
            Context(0, 1, capacity, 1 << 30, 1, 1 << 30, {"cache": cache, "eviction": eviction}, truth=truth)
        )
    pool = BlockPool(capacity, 1, cache, eviction)
    told = type(eviction).on_admit is not Role.on_admit
    answers = []
    for i, arrival in enumerate(arrivals):
        request = Request(arrival, i, max_model_len=1 << 30, eos_token_ids=frozenset())
        pool.now = arrival.time
        found = cache.match(request, [], 1)
        pool.acquire(found)
        request.block_table = found
        if told:
            eviction.on_admit(request, arrival.time)
        if not found:
            request.block_table = pool.allocate(1)
            publish(pool, request, 1)
        pool.release(request.block_table)
        answers.append(bool(found))
        if check:
            pool.check()
    return answers


def zipf(seed: int, length: int, objects: int, alpha: float = 0.8) -> list[int]:
    """Object ids, most popular first; a tenth of the requests are a scan, so that policies differ."""
    rng = random.Random(seed)
    weights = list(accumulate((i + 1) ** -alpha for i in range(objects)))
    stream = rng.choices(range(objects), cum_weights=weights, k=length)
    for i in range(0, length, 10):
        stream[i] = objects + i
    return stream


def reference(cache, objects: Iterable[int]) -> list[bool]:
    """The same stream through a cache of libCacheSim."""
    from libcachesim import Request as Access

    answers = []
    for key in objects:
        access = Access()
        access.obj_id, access.obj_size = key, 1
        answers.append(bool(cache.get(access)))
    return answers
