"""The command that a user types, `python run.py ...`, beside the same command with other options: what its
defaults cost.

    python experiments/bench_command.py [default] [budgets] [repeats] [tp] [--repeats 3] [--model qwen3_8b]
    [--gpus 0,1]

default  no kernel flag at all, against the best flags found by hand
budgets  scheduler=chunked with 512 and 2,048 tokens per step, and without a number, against scheduler=fcfs
repeats  an open load at 80% of what the GPU can do, the same command in three processes
tp       one GPU against two with parallel.tp=2

Random weights, nano-vLLM's 256 requests at once unless said otherwise. Variants of a figure take turns in
every repeat, each in a process of its own, so the machine's moods meet all of them; with several GPUs they
also change cards.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import online
from cards import on_cards

ROOT = Path(__file__).resolve().parent.parent
USUAL = ["scheduler=chunked", "cache=radix"]
BY_HAND = [
    "kernels=flash_attn", "kernels.decode=triton", "kernels.cuda_graphs=true", "engine.max_inflight=2",
    "engine.block_size=256", "scheduler.token_budget=8192",
]  # fmt: skip
NANO = ["workload=nano_bench"]
OPEN = [
    "workload=shared_prefix",
    "workload.rate=26",
    *(f"workload.{name}={value}" for name, value in online.LOAD.items()),
    f"engine.num_blocks={online.BLOCKS}",
    f"scheduler.token_budget={online.BUDGET}",
]


def run(model: str, options: list[str], devices: str) -> dict[str, Any]:
    """The summary of one run. devices: numbers of GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "run.py",
            f"model={model}",
            "model.load_format=dummy",
            "tracking=none",
            f"hydra.run.dir={folder}/run",
            "results.files=[summary.json]",
            *options,
        ]
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES=devices, HF_HUB_OFFLINE="1")
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        print(f"-- {seconds:.0f} s, exit {done.returncode}: {' '.join(options)}", flush=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        found = next(Path(folder).rglob("summary.json"))
        summary: dict[str, Any] = json.loads(found.read_text())
        return summary


def throughputs(
    args: argparse.Namespace, variants: dict[str, list[str]], both: str | None = None
) -> dict[str, float]:
    """Medians of output tokens/s per variant, printed with their spread. `both`: the variant that takes two
    cards."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for _ in range(args.repeats):
        jobs = {name: partial(run, args.model, variants[name]) for name in names}
        if both:
            summaries = [(name, job("0,1" if name == both else "0")) for name, job in jobs.items()]
        else:
            summaries = list(on_cards(jobs, args.gpus))
        for name, summary in summaries:
            found[name].append(summary["output_throughput"])
            print(f"   {name}: {summary['output_throughput']:,.0f} output tok/s, {late(summary)}", flush=True)
        names = names[1:] + names[:1]  # on another card the next time
    for name, values in found.items():
        print(
            f"   {name:<12} {statistics.median(values):>9,.0f} tok/s ({min(values):,.0f} to "
            f"{max(values):,.0f})"
        )
    return {name: statistics.median(values) for name, values in found.items()}


def late(summary: dict[str, Any]) -> str:
    return (
        f"{summary['late_preparations']} late compilations or captures, warm-up "
        f"{summary['warmup_seconds']:.1f} s"
    )


def goal(what: str, value: float, reached: bool, wanted: str) -> None:
    print(f"   {what}: {value:.3f} ({'met' if reached else 'MISSED'}: {wanted})", flush=True)


def default(args: argparse.Namespace) -> None:
    speeds = throughputs(args, {"default": [*USUAL, *NANO], "by hand": [*USUAL, *BY_HAND, *NANO]})
    ratio = speeds["default"] / speeds["by hand"]
    goal("the command as it is over the best flags", ratio, ratio >= 0.98, "at least 0.98")


def budgets(args: argparse.Namespace) -> None:
    chunked = ["scheduler=chunked", "cache=hash", *NANO]
    speeds = throughputs(
        args,
        {
            "fcfs": ["scheduler=fcfs", "cache=hash", *NANO],
            "512": [*chunked, "scheduler.token_budget=512"],
            "2048": [*chunked, "scheduler.token_budget=2048"],
            "derived": chunked,
        },
    )
    for name, least in (("512", 0.93), ("2048", 0.97), ("derived", 0.97)):
        ratio = speeds[name] / speeds["fcfs"]
        goal(f"chunked, {name} tokens per step, over fcfs", ratio, ratio >= least, f"at least {least}")


def repeats(args: argparse.Namespace) -> None:
    jobs = {f"process {number}": partial(run, args.model, [*USUAL, *OPEN]) for number in range(3)}
    summaries = [summary for _, summary in on_cards(jobs, args.gpus.partition(",")[0])]
    for name, most in (("mean_ttft_ms", 0.10), ("mean_tpot_ms", 0.05)):
        values = [summary[name] for summary in summaries]
        apart = max(values) / min(values) - 1
        print(f"   {name}: {', '.join(f'{value:.2f}' for value in values)}")
        goal(f"{name}, largest over smallest, less one", apart, apart <= most, f"at most {most}")


def tp(args: argparse.Namespace) -> None:
    variants = {"one GPU": [*USUAL, *NANO], "two GPUs": [*USUAL, *NANO, "parallel.tp=2"]}
    speeds = throughputs(args, variants, both="two GPUs")
    ratio = speeds["two GPUs"] / speeds["one GPU"]
    goal("two GPUs over one", ratio, ratio >= 1.7, "at least 1.7")


FIGURES = {"default": default, "budgets": budgets, "repeats": repeats, "tp": tp}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", default=["default"], metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="qwen3_8b")
    parser.add_argument(
        "--gpus", default="0", help="numbers, as 0,1: runs of a figure that take one GPU run at once"
    )
    args = parser.parse_args()
    if unknown := set(args.figures) - set(FIGURES):
        parser.error(
            f"no figure is called {', '.join(sorted(unknown))}: expected some of {', '.join(FIGURES)}"
        )
    for name in args.figures:
        print(f"\n{name}", flush=True)
        FIGURES[name](args)


if __name__ == "__main__":
    main()
