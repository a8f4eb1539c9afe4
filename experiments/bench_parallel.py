"""Tensor and pipeline parallelism on the GPUs of one host: one command, random weights, medians of three.

    python experiments/bench_parallel.py plan                 what a step's plan costs on its way to the ranks
    python experiments/bench_parallel.py gpus --out DIR       all PHASES on four GPUs; some: --phases 3 5
    python experiments/bench_parallel.py layout --tp 2 ...    one layout in this process

decode    prompts of 256 tokens, then steps in which every request decodes (mean context 270 to 320 tokens);
          tokens/s of windows of those steps; with `--prompts random` the prompts are not computed, which
          changes nothing about the steps that are measured: every request has its own blocks, filled with
          random numbers
prefill   prompts of 1,024 tokens and 4 answers each; prompt tokens/s of the whole run
bubbles   prompts of 1,024 tokens and answers of 64 as they find room, 2,048 tokens per plan: the share of a
          stage's time in which it waits for input, from events around its layers
share     kernel time of the driver's rank by torch.profiler, per step, at the end of a decode run and in a
          prefill run of its own: communication (and copies) against everything, and how much of it ran while
          something else did

`--modes` measures several ways to communicate in one start, see MODES. docs/parallel.md says which phase
gives which of its tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.parallel_profile import Profile, Window  # noqa: E402
from headway import Arrival, Engine, EngineConfig, ModelConfig, SamplingParams, hookimpl  # noqa: E402
from plugins.kernels.torch import TorchKernels  # noqa: E402
from plugins.kernels.triton import TritonKernels  # noqa: E402
from plugins.parallel.config import MeshConfig  # noqa: E402

SHAPES = {
    "tiny": {"name_or_path": "tiny", "load_format": "auto"},
    "qwen3_8b": {
        "architecture": "Qwen3ForCausalLM",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "dtype": "bfloat16",
        "load_format": "dummy",
    },
    "qwen3_32b": {
        "architecture": "Qwen3ForCausalLM",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 25600,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "dtype": "bfloat16",
        "load_format": "dummy",
    },
    "llama_70b": {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "dtype": "bfloat16",
        "load_format": "dummy",
    },
}
REPEATS = 3
#: (how steps of at least `--overlap-tokens` tokens communicate, through what); "symmetric" takes NCCL without
#: `--all-reduce symmetric`
MODES = {
    "split": ("split", "symmetric"),  # tokens shared between products, copy engines beside the products
    "split_library": ("split", "library"),
    "symmetric": ("whole", "symmetric"),  # one all-reduce after a product
    "library": ("whole", "library"),
}


@dataclass
class FewGraphs(TritonKernels):
    """Triton kernels with decode graphs of the measured batch sizes only: capturing the rest would take most
    of the time here."""

    plugin_name = "few_graphs"
    sizes: str = ""
    prompts: str = "computed"
    cuda_graphs: bool = True

    def operations(self, device: str) -> Any:
        from plugins.executors.torch import graphs, runner

        if self.prompts == "random":
            runner.ModelRunner._mixed = randomly(runner.ModelRunner._mixed)  # type: ignore[method-assign]

        sizes = [int(size) for size in self.sizes.split(",") if size != "0"]
        graphs.batch_sizes = lambda largest: sorted(
            {min(size, largest) for size in [*sizes, largest]}, reverse=True
        )
        return super().operations(device)


@hookimpl
def headway_register(registry: Any) -> None:
    registry.add("kernels", FewGraphs.plugin_name, FewGraphs)


@contextmanager
def installed() -> Iterator[None]:
    """This module is a plugin of an installed package, here and in the processes that are started
    meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "bench_parallel-1.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Name: bench_parallel\nVersion: 1\n")
        (package / "entry_points.txt").write_text("[headway]\nbench_parallel = experiments.bench_parallel\n")
        sys.path.append(folder)
        yield


class RandomPrompts:
    """The model in steps with prompts, when only the decode steps that follow are measured: random numbers
    for the keys and values of all requests, drawn once, and for the hidden states that first tokens are
    sampled from. Each request has blocks of its own."""

    def __init__(self, model: Any) -> None:
        self.compute_logits, self._size, self._drawn = (
            model.compute_logits,
            model.spec.shape.hidden_size,
            False,
        )

    def __call__(self, tokens: Any, positions: Any, caches: Any, batch: Any) -> Any:
        keys = caches[0][0]
        if not self._drawn:
            for part in (part for cache in caches for part in cache):
                part.normal_()
            self._drawn = True
        return keys.new_empty(len(tokens), self._size).normal_()


def randomly(mixed: Any) -> Any:
    """ModelRunner._mixed with RandomPrompts for a model."""
    stand_in: list[RandomPrompts] = []

    def run(runner: Any, *args: Any) -> Any:
        model = runner.model
        stand_in[:] = stand_in or [RandomPrompts(model)]
        runner.model = stand_in[0]
        try:
            return mixed(runner, *args)
        finally:
            runner.model = model

    return run


def report(**result: Any) -> None:
    print("RESULT " + json.dumps(result), flush=True)


# ---- one layout ------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        from core.compose.build import build_roles
        from headway import default_choices, load_registry
        from plugins.executors.torch import TorchExecutor
        from plugins.kernels.compose import lookup
        from plugins.schedulers.chunked import ChunkedPrefill

        self.args, self.ids, self.rng = args, count(), Random(0)
        self.layout = f"tp{args.tp}pp{args.pp}{'' if args.all_reduce == 'library' else ' ' + args.all_reduce}"
        self.mode = ""
        # One plan more than stages hides the way of the tokens back to the driver, as two do on one stage.
        depth = args.pp + 1 if args.depth is None else args.depth
        shares = sorted({-(-batch // (depth if args.pp > 1 else 1)) for batch in args.batches})
        if args.device == "cuda":
            kernels: Any = FewGraphs(sizes=",".join(map(str, [*shares, args.requests])), prompts=args.prompts)
        else:
            kernels = TorchKernels()
        parallel = MeshConfig(
            tp=args.tp, pp=args.pp, all_reduce=args.all_reduce, overlap_tokens=args.overlap_tokens, timeout=60
        )
        limits = EngineConfig(
            max_num_seqs=max(args.batches),
            max_num_batched_tokens=args.budget,
            max_model_len=2048,
            max_inflight=depth,
            num_blocks=args.blocks,
        )
        began = time.perf_counter()
        executor = TorchExecutor(device=args.device, profile=args.pp > 1)
        executor.prepare(
            ModelConfig(**SHAPES[args.model]),
            kernels,
            engine=limits,
            backends=lookup({"torch": TorchKernels, "triton": TritonKernels}),
            parallel=parallel,
        )
        loaded = time.perf_counter()
        self.scheduler = ChunkedPrefill(token_budget=args.budget)
        roles = build_roles(load_registry(), default_choices(cache="none"))[0] | {
            "scheduler": self.scheduler,
            "executor": executor,
        }
        self.engine = Engine(roles, limits)
        self.executor = executor
        self.records: list[Any] = []
        self.engine.calls.callbacks["on_step_end"].append((executor, self._step_ended))
        self.hooks: dict[int, Any] = {}
        report(
            layout=self.layout,
            model=args.model,
            figure="start",
            load_s=loaded - began,
            start_s=time.perf_counter() - loaded,
            kv_blocks=self.engine.pool.num_blocks,
        )

    def _step_ended(self, record: Any) -> None:
        self.records.append(record)
        for hook in list(self.hooks.values()):
            hook(record)

    def run(self, requests: int, prompt: int, output: int) -> float:
        """Seconds of a run of equal requests that all wait at its start."""
        vocab = self.executor.caps.vocab_size
        sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        arrivals = [
            Arrival(
                0.0, [self.rng.randrange(vocab) for _ in range(prompt)], sampling, id=f"r{next(self.ids)}"
            )
            for _ in range(requests)
        ]
        self.records.clear()
        began = time.perf_counter()
        self.engine.run(arrivals)
        return time.perf_counter() - began

    def steady(self, batch: int) -> list[Any]:
        """Records of the steps in which all of `batch` requests decode."""
        return [r for r in self.records if self._is_steady(r, batch)][2:]

    @staticmethod
    def _is_steady(record: Any, batch: int) -> bool:
        return (
            record.plan.num_tokens == len(record.plan.requests)
            and record.num_running == batch
            and not record.num_waiting
        )

    def switch(self, mode: str) -> None:
        mesh = self.executor.execution.mesh if mode else None
        if mesh is not None and (mesh.long_steps, mesh.transport) != MODES[mode]:
            self.executor.execution.switch(*MODES[mode])
        self.mode = mode

    def report(self, **result: Any) -> None:
        report(
            layout=self.layout, model=self.args.model, **({"mode": self.mode} if self.mode else {}), **result
        )

    def profiled(
        self, figure: str, matches: Any, first: int, steps: int, requests: int, prompt: int, output: int
    ) -> float:
        """`run`, with a profile of `steps` steps from the `first` that matches. On one stage of GPUs; else
        `run`."""
        if self.args.pp > 1 or self.args.device != "cuda":
            return self.run(requests, prompt, output)
        self.hooks["profile"] = Profile(
            matches, first, steps, lambda **result: self.report(figure=figure, **result)
        )
        seconds = self.run(requests, prompt, output)
        del self.hooks["profile"]
        return seconds

    def decode(self, batch: int) -> None:
        args, last = self.args, self.args.steps - 16  # the steady step after which the profile begins
        # steps: prompts beside the requests that decode already
        filling = math.ceil(batch * args.prompt / (args.budget - batch / 2))
        self.profiled(
            "share", lambda r: self._is_steady(r, batch), last, 6, batch, args.prompt, filling + args.steps
        )
        steps = self.steady(batch)[:last]
        size = len(steps) // REPEATS
        if size < 2:
            self.report(figure="decode", batch=batch, problem=f"only {len(steps)} steady steps")
            return
        rates, times = [], []
        for i in range(REPEATS):
            window = steps[i * size : (i + 1) * size]
            seconds = window[-1].end - window[0].end
            rates.append(sum(r.emitted for r in window[1:]) / seconds)
            times.append(seconds / (size - 1))
        self.report(
            figure="decode",
            batch=batch,
            depth=self.engine.max_inflight,
            tokens_per_s=statistics.median(rates),
            all=rates,
            step_ms=statistics.median(times) * 1e3,
            steps=len(steps),
        )

    def prefill(self, requests: int) -> None:
        self.scheduler.token_budget = 2048 if self.args.pp > 1 else self.args.budget
        self.run(max(2, requests // 8), 1024, 4)  # warms up
        seconds, full = [], []
        for _ in range(REPEATS):
            seconds.append(self.run(requests, 1024, 4))
            steps = [r for r in self.records if r.plan.num_tokens == self.args.budget]
            full += (
                [self.args.budget * (len(steps) - 1) / (steps[-1].end - steps[0].end)]
                if len(steps) > 1
                else []
            )
        rates = [requests * 1024 / s for s in seconds]
        self.report(
            figure="prefill",
            requests=requests,
            tokens_per_s=statistics.median(rates),
            all=rates,
            full_steps_only=full,
        )
        if self.args.pp == 1 and self.args.device == "cuda":
            self.profiled(
                "share of prefill", lambda r: r.plan.num_tokens == self.args.budget, 2, 2, requests, 1024, 4
            )
        self.scheduler.token_budget = self.args.budget

    def bubbles(self, requests: int) -> None:
        self.scheduler.token_budget = 2048
        for depth in (self.args.pp, self.args.pp + 1):
            self.engine.flights.max_inflight = depth
            window = Window(self.executor.execution.all_stage_times, first=16, last=16 + self.args.window)
            self.hooks["window"] = window
            seconds = self.run(requests, 1024, 64)
            del self.hooks["window"]
            results = [round(1 - busy / elapsed, 4) for busy, elapsed in window.result if elapsed]
            self.report(
                figure="bubbles",
                depth=depth,
                idle_share_of_stage=results,
                tokens_per_s=requests * 1088 / seconds,
                times=window.result,
            )
        self.scheduler.token_budget = self.args.budget


def one_layout(args: argparse.Namespace) -> None:
    bench = Bench(args)
    modes = args.modes or [""]
    decode = [
        case.rpartition(":") for case in args.decode or [f"{modes[0]}:{batch}" for batch in args.batches]
    ]
    try:
        for mode in modes:
            bench.switch(mode)
            for batch in [int(batch) for name, _, batch in decode if name == mode]:
                bench.decode(batch)
            if args.pp > 1 and args.device == "cuda":
                bench.bubbles(args.requests * 2)
            if args.requests:
                bench.prefill(args.requests)
    finally:
        bench.executor.close()
    report(layout=bench.layout, figure="closed")


# ---- the plan --------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> None:
    """Microseconds from a StepInput of 256 requests to its receipt by every rank, in processes of their
    own."""
    import numpy as np

    from plugins.executors.torch.batch import StepInput
    from plugins.parallel import channel as wire
    from plugins.parallel.messages import pack_step

    script = (
        "import sys, socket; from plugins.parallel import channel as w; from plugins.parallel.messages "
        "import unpack_step\n"
        "c = w.Channel(socket.socket(fileno=int(sys.argv[1])))\n"
        "c.send(w.ANSWER)\n"
        "while True:\n"
        "    kind, body = c.receive()\n"
        "    if kind == w.QUIT: break\n"
        "    unpack_step(body); c.send(w.ANSWER)\n"
    )
    for ranks in (1, 3, 7):
        channels, others = [], []
        for _ in range(ranks):
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-c", script, str(theirs.fileno())]
                others.append(subprocess.Popen(command, cwd=ROOT, pass_fds=(theirs.fileno(),)))
            channels.append(wire.Channel(ours))
        for channel in channels:
            channel.receive()
        # A steady decode step of 256: 16 new blocks. The largest: all 256 rows and tokens of a pipeline, and
        # those blocks.
        for name, words in (
            ("decode, same rows", 48),
            ("decode, new rows and tokens", 48 + 512),
            ("mixed, 8192 tokens", 17_500),
        ):
            step = StepInput(
                data=np.arange(words, dtype=np.int32),
                decode=True,
                same_rows=True,
                num_seqs=256,
                num_tokens=256,
                num_samples=256,
                num_updates=16,
                num_admitted=0,
                max_query=1,
                max_context=1024,
                sampling=0,
                logprobs=-1,
                sampled=None,
            )
            sent, received = [], []
            for _ in range(args.rounds):
                began = time.perf_counter()
                body = pack_step(step)
                for channel in channels:
                    channel.send(wire.STEP, body)
                sent.append(time.perf_counter() - began)
                for channel in channels:
                    channel.receive()
                received.append(time.perf_counter() - began)
            report(
                figure="plan",
                ranks=ranks,
                step=name,
                bytes=len(body),
                send_us=statistics.median(sent) * 1e6,
                round_trip_us=statistics.median(received) * 1e6,
            )
        for channel in channels:
            channel.send(wire.QUIT)
        for other in others:
            other.wait()


# ---- everything on four GPUs -----------------------------------------------------------------------------

LAYOUT, PYTEST = f"{__file__} layout ", "-m pytest -q tests/gpu/test_parallel_gpu.py"
TP4 = LAYOUT + "--tp 4 --all-reduce symmetric --overlap-tokens 1024 "
FULL = "--prompts random --requests 0 --steps 40 "  # decode alone, with as many requests as memory holds
COMPUTED = "split:1024 split:2560 symmetric:1024"
SATURATED = "split:2560 split:4096 symmetric:1024 symmetric:2560"

#: Runs of a phase go at once, as they share no GPU. (GPUs, what python runs, seconds after which it is ended)
PHASES: list[list[tuple[str, str, int]]] = [
    [("0,1", PYTEST, 150), ("2,3", LAYOUT + "--tp 2 --model llama_70b --batches 128 --requests 16", 70)],
    [("0,1,2,3", LAYOUT + "--pp 4 --batches 256 1024 --requests 96", 75)],
    [
        ("0", LAYOUT + "--tp 1 --batches 256 640 --requests 32", 85),
        ("2,3", LAYOUT + "--pp 2 --batches 256 512 --requests 48", 85),
    ],
    [("0,1,2,3", LAYOUT + "--tp 2 --pp 2 --batches 256 1024 --requests 64", 65)],
    [("0,1,2,3", LAYOUT + "--tp 4 --all-reduce symmetric --batches 256 1024 --requests 96", 75)],
    [("0,1,2,3", LAYOUT + "--tp 4 --batches 256 1024 --requests 96", 75)],
    [("0,1", LAYOUT + "--tp 2 --batches 256 512 --requests 48", 80)],
    [
        (
            "0,1,2,3",
            TP4
            + "--batches 1024 2560 --requests 48 --modes split symmetric library split_library --decode "
            + COMPUTED,
            200,
        )
    ],
    [("0", LAYOUT + "--tp 1 --batches 640 768 " + FULL, 90)],
    [
        (
            "0,1,2,3",
            TP4
            + FULL
            + "--batches 1024 2560 4096 --budget 32768 --modes split symmetric --decode "
            + SATURATED,
            120,
        )
    ],
    [("0,1,2,3", PYTEST + " -k 'tp2pp2 or tp4'", 150)],
]


def gpus(args: argparse.Namespace) -> None:
    """Writes results.jsonl and logs.txt as they come."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for phase in (PHASES[number] for number in args.phases):
        running = []
        for devices, what, limit in phase:
            left = args.seconds - (time.perf_counter() - started)
            print(
                f"{time.perf_counter() - started:6.1f} s  GPU {devices}: {what}"
                + (": left out, no time" if left < 30 else ""),
                flush=True,
            )
            if left < 30:
                continue
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices, "PYTHONUNBUFFERED": "1"}
            log = tempfile.TemporaryFile("w+")
            process = subprocess.Popen(
                [sys.executable, *shlex.split(what)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
            )
            running.append((process, what, time.perf_counter() + min(limit, left), log))
        for process, what, until, log in running:
            try:
                process.wait(max(0.1, until - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()  # its ranks end with it
                process.wait()
                print(f"        out of time: {what}", flush=True)
            log.seek(0)
            text = log.read()
            results = [line[7:] for line in text.splitlines() if line.startswith("RESULT ")]
            with (out / "results.jsonl").open("a") as file:
                file.writelines(line + "\n" for line in results)
            with (out / "logs.txt").open("a") as file:
                file.write(f"==== {what}\n{text[-40000:]}\n")
            shown = [line for line in results if '"top"' not in line]
            print("\n".join(shown), flush=True)
            if process.returncode or what.startswith(PYTEST):
                print(f"        exit code {process.returncode}\n{text[-1200:]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    layout = verbs.add_parser("layout")
    layout.add_argument("--tp", type=int, default=1)
    layout.add_argument("--pp", type=int, default=1)
    layout.add_argument("--all-reduce", default="library")
    layout.add_argument("--overlap-tokens", type=int, default=MeshConfig.overlap_tokens)
    layout.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        help="ways to communicate to measure in turn; one as configured unless given",
    )
    layout.add_argument(
        "--decode",
        nargs="+",
        metavar="MODE:BATCH",
        help="the decode figures; every batch in the first mode unless given",
    )
    layout.add_argument("--device", default="cuda")
    layout.add_argument("--model", default="qwen3_32b", choices=SHAPES)
    layout.add_argument("--batches", type=int, nargs="+", default=[256])
    layout.add_argument("--requests", type=int, default=32, help="of the prefill figure; 0: without it")
    layout.add_argument(
        "--prompts",
        default="computed",
        choices=("computed", "random"),
        help="random: decode figures alone, see RandomPrompts",
    )
    layout.add_argument("--prompt", type=int, default=256, help="tokens, of the decode figure")
    layout.add_argument("--steps", type=int, default=60, help="of the decode figure")
    layout.add_argument("--window", type=int, default=40, help="steps, of the bubbles figure")
    layout.add_argument("--budget", type=int, default=8192, help="tokens per step")
    layout.add_argument("--depth", type=int, default=None, help="plans in flight; pp + 1 unless given")
    layout.add_argument("--blocks", type=int, default=None)
    everything = verbs.add_parser("gpus")
    everything.add_argument("--out", required=True)
    everything.add_argument(
        "--seconds",
        type=float,
        default=1200,
        help="of all phases; what would begin in the last 30 is left out",
    )
    everything.add_argument(
        "--phases", type=int, nargs="+", default=range(len(PHASES)), help="which of PHASES, by number"
    )
    verbs.add_parser("plan").add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    if args.verb == "layout" and args.prompts == "random" and (args.requests or args.pp > 1):
        parser.error("--prompts random computes no prompts: it goes with --requests 0 and one stage")
    {"layout": one_layout, "gpus": gpus, "plan": plan}[args.verb](args)


if __name__ == "__main__":
    # Ranks build kernels from their registry, so this module must be one that is imported by name.
    sys.modules["experiments.bench_parallel"] = sys.modules["__main__"]
    FewGraphs.__module__ = "experiments.bench_parallel"
    with installed():
        main()
