"""Prefix hit rate of a Mooncake trace by cache capacity: the block pool, a prefix index and an eviction,
without an engine.

    python experiments/mooncake_hit_rate.py TRACE.jsonl[.gz] [--capacity 500 1000 ...] [--cache hash]
    [--eviction lru] python experiments/mooncake_hit_rate.py TRACE.jsonl[.gz] --capacity 16000 --eviction fifo
    sieve s3fifo two_q arc lru --subtree

Every hash id counts as one block of one token, so that the trace's own blocks are the pool's. Requests come
in order of arrival, one at a time: leading ids that are cached are hits, the rest is allocated, and all are
given back, tail first, before the next request. Rates are weighted by tokens (512 a block, the last one
partial) and by blocks. With --subtree each is followed by the one with cache.subtree=true, where an eviction
may take a block that others hang under, and takes them along.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.blocks import BlockPool
from core.compose.hooks import load_registry
from core.context import Context
from core.inputs import Arrival
from core.request import Request
from core.roster import publish
from plugins.workloads.trace import Mooncake


def hit_rates(
    rows, capacity: int, cache_name: str = "hash", eviction_name: str = "lru", *, subtree: bool = False
) -> tuple[float, float]:
    """(by tokens, by blocks). `rows` are the trace's."""
    registry = load_registry()
    cache, eviction = (
        registry.get("cache", cache_name).build(subtree=subtree),
        registry.get("eviction", eviction_name).build(),
    )
    for role in (cache, eviction):
        role.setup(
            Context(
                seed=0,
                block_size=1,
                num_blocks=capacity,
                max_model_len=1 << 30,
                max_num_seqs=1,
                max_num_batched_tokens=1 << 30,
                roles={"cache": cache, "eviction": eviction},
            )
        )
    pool = BlockPool(capacity, 1, cache, eviction)
    hit_tokens = hit_blocks = 0
    for index, row in enumerate(rows):
        ids = row.block_ids
        request = Request(Arrival(row.time, ids), index, max_model_len=1 << 30, eos_token_ids=frozenset())
        pool.now = row.time
        found = cache.match(request, [], len(ids))
        pool.acquire(found)
        request.block_table = found + pool.allocate(len(ids) - len(found))
        request.num_published_blocks, request.published_parent = (
            len(found),
            found[-1] if found else request.published_parent,
        )
        publish(pool, request, len(ids))
        pool.release(request.block_table)
        cache.on_finish(request, row.time)
        hit_blocks += len(found)
        hit_tokens += min(len(found) * row.block_size, row.input_len)
    return hit_tokens / sum(row.input_len for row in rows), hit_blocks / sum(
        len(row.block_ids) for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", help="a Mooncake JSONL file, gzip or not")
    parser.add_argument(
        "--capacity", type=int, nargs="*", default=[500, 1000, 2000, 5000, 10000, 20000, 50000], help="blocks"
    )
    parser.add_argument("--cache", default="hash")
    parser.add_argument("--eviction", nargs="*", default=["lru"])
    parser.add_argument("--subtree", action="store_true", help="also with cache.subtree=true")
    options = parser.parse_args()
    rows = Mooncake(path=options.trace).rows()
    everything = sum(len(row.block_ids) for row in rows)
    print(
        f"{len(rows)} requests, {everything} blocks, {len({id for row in rows for id in row.block_ids})} of "
        "them distinct"
    )
    print(f"{'capacity':>10} {'by tokens':>10} {'by blocks':>10} {'seconds':>8}   cache, eviction")
    for eviction in options.eviction:
        for capacity in [*options.capacity, everything]:
            for subtree in (False, True) if options.subtree else (False,):
                began = time.perf_counter()
                tokens, blocks = hit_rates(rows, capacity, options.cache, eviction, subtree=subtree)
                label = "unlimited" if capacity == everything else capacity
                seconds = time.perf_counter() - began
                what = f"{options.cache}, {eviction}" + (", subtree" if subtree else "")
                print(f"{label:>10} {tokens:>10.4f} {blocks:>10.4f} {seconds:>8.2f}   {what}")


if __name__ == "__main__":
    main()
