"""What a simulated run costs through the engine and its compiled twin: CPU seconds of the whole process.

    python -m plugins.native.build
    python experiments/bench_native.py [--mooncake FILE] [--azure FILE] [--repeats 3] [--python-repeats 1]

decode    1,024 requests at once, 16 to 128 tokens in, 256 to 1,024 out: no file is needed
mooncake  Mooncake's conversation trace (as published, gzipped or not) at half speed
azure     the hour of Azure's conversation trace (2023)

Qwen3-8B's shape on an H200, chunked + fcfs + hash + lru, blocks of 16. Each run is `python run.py ...` in a
process of its own, start-up and table included, without files (`results=summary`) and with all. Runs of a
load must agree in everything that their summaries say, but for what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_sim_files import SIM, cpu_name, shown

ROOT = Path(__file__).resolve().parent.parent
DECODE = [
    "workload=random",
    "workload.num_requests=1024",
    "workload.input_len=[16,128]",
    "workload.output_len=[256,1024]",
]
MEASURED = ("policy_time", "policy_time_per_step_us", "loop")


def one(native: str, files: str, load: list[str]) -> tuple[float, dict[str, Any]]:
    """CPU seconds of a run, and its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "run.py",
            *SIM,
            "tracking=none",
            *load,
            f"engine.native={native}",
            f"results={files}",
            f"hydra.run.dir={folder}/run",
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = process.stdout.read() if process.stdout else ""
        _, code, used = os.wait4(process.pid, 0)
        if code:
            sys.exit(said[-2000:])
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    return used.ru_utime + used.ru_stime, summary


def compare(name: str, load: list[str], repeats: dict[str, int]) -> None:
    spent: dict[tuple[str, str], list[float]] = {}
    first: dict[str, Any] = {}
    for turn in range(max(repeats.values())):
        for native, count in repeats.items():
            for files in ("summary", "all") if turn < count else ():
                seconds, summary = one(native, files, load)
                spent.setdefault((native, files), []).append(seconds)
                told = {key: value for key, value in summary.items() if key not in MEASURED}
                first = first or told
                if json.dumps(told) != json.dumps(first):
                    sys.exit(f"{name}: runs differ in {[key for key in told if told[key] != first.get(key)]}")
    print(
        f"\n{name}: {first['num_requests']:,} requests, {first['num_steps']:,} steps, "
        f"{first['decision_hash']}"
    )
    print(f"{'engine':>8} {'CPU s without files':>24} {'with all files':>24}")
    for native, words in (("never", "python"), ("always", "native")):
        if repeats[native]:
            print(f"{words:>8} {shown(spent[native, 'summary']):>24} {shown(spent[native, 'all']):>24}")
    if all(repeats.values()):
        without, with_files = (
            statistics.median(spent["never", files]) / statistics.median(spent["always", files])
            for files in ("summary", "all")
        )
        print(f"{'ratio':>8} {without:>24.1f} {with_files:>24.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mooncake", default="")
    parser.add_argument("--azure", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--python-repeats", type=int, default=1)
    args = parser.parse_args()
    loads = {"decode": DECODE}
    if args.mooncake:
        loads["mooncake"] = [
            "workload=mooncake",
            f"workload.path={Path(args.mooncake).resolve()}",
            "workload.time_scale=2",
        ]
    if args.azure:
        loads["azure"] = ["workload=azure", f"workload.path={Path(args.azure).resolve()}"]
    print(f"Python {platform.python_version()}, {platform.machine()}, {cpu_name()}: median (spread)")
    for name, load in loads.items():
        compare(name, load, {"never": args.python_repeats, "always": args.repeats})


if __name__ == "__main__":
    main()
