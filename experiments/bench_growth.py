"""How the host's cost of a step grows with the requests that run, those that wait and the blocks in the
cache: all else equal, ten times as much of one of them should cost at most ten times as much.

    python experiments/bench_growth.py [running] [waiting] [cached] [--repeats 3] [--scheduler chunked]
                                       [--cache hash] [--eviction lru] [--json FILE]

running  microseconds per step in which all of them decode
waiting  per step of 64 requests that decode while so many wait and cannot start
cached   per request of 256 new tokens that is computed and evicts 16 blocks of a cache of so many

The exponent beside a row is log(cost) over log(size) since the row above: 1 is linear.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from bench_core import measure

from core.compose.build import build_roles
from headway import (
    Arrival,
    Engine,
    EngineConfig,
    SamplingParams,
    VirtualExecutor,
    default_choices,
    load_registry,
)

SIZES = {
    "running": [64, 256, 1024, 4096],
    "waiting": [64, 1024, 16_384, 131_072],
    "cached": [1024, 16_384, 131_072, 524_288],
}
BLOCK, PROMPT, STEPS, REQUESTS = 16, 256, 100, 200
LINEAR = 1.1  # exponents up to this count as linear: caches of the processor are no policy's fault


def running(args: argparse.Namespace, size: int) -> float:
    return measure(args.scheduler, args.cache, size, 64, steps=STEPS)[1] * size


def waiting(args: argparse.Namespace, size: int) -> float:
    return measure(args.scheduler, args.cache, 64, size, steps=STEPS)[1] * 64


def cached(args: argparse.Namespace, size: int) -> float:
    """The pool is filled with prompts of no two equal blocks, each of which stays in the cache."""
    choices = default_choices(scheduler=args.scheduler, cache=args.cache, eviction=args.eviction)
    roles, _ = build_roles(load_registry(), choices)
    roles["executor"] = VirtualExecutor(overhead=0.0, max_model_len=1 << 30, vocab_size=1 << 62)
    engine = Engine(roles, EngineConfig(num_blocks=size, max_num_seqs=8, max_num_batched_tokens=1 << 20))
    made = 0

    def serve(tokens: int) -> None:
        nonlocal made
        prompt = list(range(made, made + tokens))
        made += tokens
        engine.add(Arrival(0.0, prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
        while engine.step():
            pass

    while made < size * BLOCK:
        serve(min(64 * BLOCK, size * BLOCK // 2))
    gc.collect()
    gc.freeze()
    began = time.perf_counter()
    for _ in range(REQUESTS):
        serve(PROMPT)
    spent = time.perf_counter() - began
    assert engine.pool.num_cached >= 0.9 * size, (engine.pool.num_cached, size)
    return spent / REQUESTS * 1e6


MEASURES: dict[str, Callable[[argparse.Namespace, int], float]] = {
    "running": running,
    "waiting": waiting,
    "cached": cached,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=list(MEASURES), metavar="WHAT", help=", ".join(MEASURES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scheduler", default="chunked")
    parser.add_argument("--cache", default="hash")
    parser.add_argument("--eviction", default="lru")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    if unknown := set(args.what) - set(MEASURES):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(MEASURES)}")
    print(f"Python {platform.python_version()}, {platform.machine()}, {args.scheduler} + {args.cache}")
    found = {}
    for what in args.what:
        runs = {size: [MEASURES[what](args, size) for _ in range(args.repeats)] for size in SIZES[what]}
        found[what] = {size: statistics.median(values) for size, values in runs.items()}
        print(f"\n{what:>10} {'us':>10} {'min..max':>18} {'exponent':>9}")
        exponents = {
            b: math.log(found[what][b] / found[what][a]) / math.log(b / a) for a, b in pairwise(SIZES[what])
        }
        for size, values in runs.items():
            shown = f"{exponents[size]:>9.2f}" if size in exponents else ""
            print(
                f"{size:>10,} {found[what][size]:>10,.0f} {min(values):>8,.0f}..{max(values):<8,.0f} {shown}"
            )
        most = max(exponents.values())
        print(f"   largest exponent {most:.2f} ({'met' if most <= LINEAR else 'MISSED'}: linear or better)")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
