"""What a simulated run costs, and what its files add: CPU seconds, the garbage collector's share, peak
memory.

    python experiments/bench_sim_files.py [--loads turns mooncake] [--trace FILE] [--repeats 5]

turns     conversations of a Mooncake-like size, made by workload=multi_turn: no file is needed
mooncake  the first 10 minutes of Mooncake's conversation trace (--trace, as published or gzipped) at half
          speed

Each run is a process of its own, `none` (no file is written) and `all` take turns, and what is measured
begins with the built engine and ends with the last file on the disk. All runs of a load must take the same
decisions at the same times: their fingerprint is of the decision hash, every token's time and every reading
of the clock.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import hashlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIM = [
    "executor=sim",
    "model=qwen3_8b",
    "hardware=h200",
    "scheduler=chunked",
    "cache=hash",
    "engine.block_size=16",
]
TURNS = [
    "workload=multi_turn", "workload.num_sessions=400", "workload.turns=[1,6]", "workload.system_len=512",
    "workload.input_len=[512,8192]", "workload.output_len=[64,640]", "workload.think_time=20",
    "workload.arrival=poisson", "workload.rate=0.6",
]  # fmt: skip
MINUTES = 10


def mooncake(trace: str) -> list[str]:
    opened: Callable[..., Any] = gzip.open if trace.endswith(".gz") else open
    with opened(trace, "rt") as lines:
        first = sum(json.loads(line)["timestamp"] < MINUTES * 60_000 for line in lines)
    return ["workload=mooncake", f"workload.path={trace}", "workload.time_scale=2", f"workload.limit={first}"]


def one(directory: Path | None, overrides: list[str]) -> dict[str, Any]:
    """Runs it in this process."""
    from core.cli import schema
    from core.compose.build import build
    from core.compose.hooks import load_registry

    registry = load_registry()
    schema.register(registry)
    composition = schema.composition(schema.composed([*overrides, "tracking=none"]))
    run = build(registry, composition, directory=directory)
    spent = collector()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    result = run.execute()
    cpu = time.process_time() - began
    seen = hashlib.blake2b(result.decision_hash.encode(), digest_size=8)
    seen.update(repr([(o.id, o.token_times) for o in result.outputs]).encode())
    seen.update(repr(run.engine.clock.readings).encode())
    return {
        "cpu": cpu,
        "gc": sum(spent),
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "mb_before": before / 1024,
        "steps": result.num_steps,
        "requests": len(result.outputs),
        "seen": seen.hexdigest(),
        "file_mb": sum(f.stat().st_size for f in directory.iterdir()) / 1e6 if directory else 0.0,
    }


def collector() -> list[float]:
    """Grows by the CPU seconds of every collection from now on."""
    spent: list[float] = []
    began = [0.0]

    def heard(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            began[0] = time.process_time()
        else:
            spent.append(time.process_time() - began[0])

    gc.callbacks.append(heard)
    return spent


def apart(files: str, overrides: list[str]) -> dict[str, Any]:
    """Runs it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", folder if files == "all" else "", *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def shown(values: list[float], form: str = ".2f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def compare(name: str, overrides: list[str], repeats: int) -> None:
    runs: dict[str, list[dict[str, Any]]] = {"none": [], "all": []}
    for _ in range(repeats):
        for files, done in runs.items():
            done.append(apart(files, overrides))
    if len(seen := {run["seen"] for done in runs.values() for run in done}) != 1:
        sys.exit(f"{name}: runs of one load differ: {seen}")
    first = runs["all"][0]
    print(
        f"\n{name}: {first['requests']:,} requests, {first['steps']:,} steps, files of "
        f"{first['file_mb']:.1f} MB, {first['seen']}"
    )
    print(f"{'files':>6} {'CPU seconds':>24} {'collector, % of it':>24} {'peak MB':>24}")
    for files, done in runs.items():
        cpu, share = [run["cpu"] for run in done], [run["gc"] / run["cpu"] * 100 for run in done]
        memory = shown([run["mb"] for run in done], ".0f")
        print(f"{files:>6} {shown(cpu):>24} {shown(share, '.1f'):>24} {memory:>24}")
    added = [b["cpu"] / a["cpu"] * 100 - 100 for a, b in zip(runs["none"], runs["all"], strict=True)]
    print(f"files add {shown(added, '.0f')} % to the run's CPU seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loads", nargs="+", choices=("turns", "mooncake"), default=["turns"])
    parser.add_argument("--trace", default="")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, *overrides = args.one
        print(json.dumps(one(Path(folder) if folder else None, overrides)))
        return
    if "mooncake" in args.loads and not args.trace:
        parser.error("the load mooncake reads a file: give --trace FILE")
    print(
        f"Python {platform.python_version()}, {platform.machine()}, {cpu_name()}, {args.repeats} runs each: "
        "median (spread)"
    )
    for name in args.loads:
        load = TURNS if name == "turns" else mooncake(args.trace)
        compare(name, [*SIM, *load], args.repeats)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


if __name__ == "__main__":
    main()
