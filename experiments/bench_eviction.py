"""What an eviction costs: nanoseconds, for every policy under both indexes, at several numbers of cached
blocks.

    python experiments/bench_eviction.py [--sizes 100 1000 10000 100000 1000000] [--evictions 20000] [--only
    sieve] [--cache radix]

The pool is full of cached chains of 64 blocks, two in three of which were hit once. The first figure is what
allocating a block costs when one must be evicted for it: the policy, the index's remove and the pool's
book-keeping. The second is the whole life of a block in a full pool: evicted, published under a parent, hit
and released. O(log n) or better shows as a row that hardly grows; what grows is the memory's latency.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from random import Random

from core.blocks import ROOT, BlockPool
from core.compose.hooks import Registry, load_registry
from core.context import Context, Truth
from core.inputs import Arrival, Tags
from core.request import Request
from core.roster import publish

CHAIN = 64  # blocks
SIZE = 16  # tokens per block
NO_EOS: frozenset[int] = frozenset()


class Bench:
    def __init__(self, registry: Registry, cache: str, eviction: str, num_blocks: int) -> None:
        self.index = registry.get("cache", cache).build()
        self.eviction = registry.get("eviction", eviction).build()
        truth = Truth()
        # Belady then knows that nothing comes back, and still keeps its order
        truth.future = [Arrival(0.0, [0] * SIZE)]
        for role in (self.index, self.eviction):
            role.setup(
                Context(
                    seed=0,
                    block_size=SIZE,
                    num_blocks=num_blocks,
                    max_model_len=1 << 30,
                    max_num_seqs=1,
                    max_num_batched_tokens=1 << 30,
                    roles={},
                    truth=truth,
                )
            )
        self.pool = BlockPool(num_blocks, SIZE, self.index, self.eviction)
        self.rng = Random(0)
        self.serial = 0

    def turn(self, blocks: int) -> None:
        """A new chain of so many blocks: allocated, published, released, and then hit by two in three."""
        pool, serial = self.pool, self.serial
        self.serial += 1
        pool.now = serial * 0.01
        tags = Tags(
            session=str(serial),
            turn=serial % 5,
            category="chat" if serial % 2 else "api",
            priority=serial % 3,
        )
        arrival = Arrival(pool.now, [serial * CHAIN + i // SIZE for i in range(blocks * SIZE)], tags=tags)
        request = Request(arrival, serial, max_model_len=1 << 30, eos_token_ids=NO_EOS)
        self.eviction.on_admit(request, pool.now)
        request.block_table = pool.allocate(blocks)
        publish(pool, request, blocks)
        pool.release(request.block_table, tags)
        if serial % 3:
            found = self.index.match(request, [], blocks)
            pool.acquire(found, tags)
            pool.release(found, tags)
        assert request.published_parent != ROOT

    def run(self, evictions: int) -> tuple[float, float]:
        """Nanoseconds per eviction, and a block's whole turn."""
        pool = self.pool
        while pool.num_free:
            self.turn(min(CHAIN, pool.num_free))
        evictions = min(evictions, pool.num_blocks)
        chain = min(CHAIN, pool.num_blocks)
        rounds = max(1, evictions // chain)
        gc.collect()
        gc.disable()
        began = time.perf_counter()
        for _ in range(rounds):
            self.turn(chain)
        turned = time.perf_counter()
        count = min(evictions, pool.num_available)
        for _ in range(count):
            pool.allocate_one()
        ended = time.perf_counter()
        gc.enable()
        return (ended - turned) / count * 1e9, (turned - began) / (rounds * chain) * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[100, 1000, 10_000, 100_000, 1_000_000], help="cached blocks"
    )
    parser.add_argument("--evictions", type=int, default=20_000)
    parser.add_argument("--only", default="", help="evictions whose name holds this")
    parser.add_argument("--cache", nargs="+", default=["hash", "radix"])
    args = parser.parse_args()
    registry = load_registry()
    print(
        f"{platform.machine()}, Python {platform.python_version()}; ns an eviction (ns a block's whole "
        "turn), by cached blocks"
    )
    print(f"{'eviction':24s}" + "".join(f"{size:>18,d}" for size in args.sizes))
    for eviction in registry.names("eviction"):
        for cache in args.cache if args.only in eviction else ():
            cells = ""
            for size in args.sizes:
                evict, turn = Bench(registry, cache, eviction, size).run(args.evictions)
                cells += f"{f'{evict:,.0f} ({turn:,.0f})':>18s}"
            print(f"{f'{eviction} {cache}':24s}{cells}", flush=True)


if __name__ == "__main__":
    main()
