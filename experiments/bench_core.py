"""Host cost of a decode-only step: scheduling and book-keeping together, microseconds per running request.

    python experiments/bench_core.py [--running 64 256 1024] [--waiting 64] [--steps 300] [--repeats 5]

The executor does nothing, so what is left is the engine: plan, decision log, token append, publishing,
metrics times. Waiting requests cannot start (the sequence cap is reached), as in a saturated server.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time

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


def measure(scheduler: str, cache: str, running: int, waiting: int, steps: int) -> tuple[float, float]:
    """(planning and book-keeping, whole loop) in microseconds per running request and step."""
    roles, _ = build_roles(load_registry(), default_choices(scheduler=scheduler, cache=cache))
    if hasattr(roles["scheduler"], "token_budget"):
        roles["scheduler"].token_budget = 8192  # a budget below `running` would keep some of them out
    roles["executor"] = VirtualExecutor(overhead=0.0, max_model_len=1 << 20)
    prompt = 64
    blocks = (running + waiting) * ((prompt + steps + 64) // 16 + 2)
    engine = Engine(roles, EngineConfig(num_blocks=blocks, max_num_seqs=running, max_num_batched_tokens=8192))
    for i in range(running + waiting):
        engine.add(
            Arrival(
                0.0,
                [(i * 131 + j * 7) % 50000 for j in range(prompt)],
                SamplingParams(max_tokens=steps + 1000, ignore_eos=True),
            )
        )
    while len(engine.running) < running or any(r.num_new_tokens != 1 for r in engine.running):
        engine.step()
    gc.collect()
    gc.freeze()
    policy, began, first = engine.counts.policy_time, time.perf_counter(), engine.counts.num_steps
    for _ in range(steps):
        engine.step()
    wall = time.perf_counter() - began
    count = (engine.counts.num_steps - first) * running
    return (engine.counts.policy_time - policy) / count * 1e6, wall / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheduler", default="chunked")
    parser.add_argument("--cache", default="hash")
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(
        f"Python {platform.python_version()}, {platform.machine()}, {args.scheduler} + {args.cache}, "
        f"{args.waiting} waiting, {args.steps} steps"
    )
    print(
        f"{'running':>8} {'policy us/req':>14} {'min..max':>14} {'loop us/req':>12} {'min..max':>14} "
        f"{'step us':>9}"
    )
    for running in args.running:
        runs = [
            measure(args.scheduler, args.cache, running, args.waiting, steps=args.steps)
            for _ in range(args.repeats)
        ]
        policy, loop = [r[0] for r in runs], [r[1] for r in runs]
        print(
            f"{running:>8} {statistics.median(policy):>14.2f} {min(policy):>7.2f}..{max(policy):<5.2f} "
            f"{statistics.median(loop):>12.2f} "
            f"{min(loop):>7.2f}..{max(loop):<5.2f} {statistics.median(loop) * running:>9.0f}"
        )


if __name__ == "__main__":
    main()
