"""The real engine's speed on one GPU, beside other engines and the roofline: one command, one machine, one
order.

    python experiments/bench_engine.py A B C D decode seam [--peer vllm=PYTHONPATH] [--peer nano=PYTHONPATH]
    [--repeats 3] [--gpus 0,1] [--json FILE]

A      nano-vLLM's benchmark: 256 requests at once, prompts and answers of 100 to 1,024 tokens, T=0.6; shape
       of Qwen3-0.6B, bf16
B      the same requests on the shape of Qwen3-8B
C      B's requests as Poisson arrivals at 80% of B's saturated rate: TTFT and TPOT
D      100 prompts of 512 tokens, 70 of which begin with the same 80% (rounded up to a block): cache=hash
       against cache=none; 8B
decode one request, 8B: step time over the time to read the weights once; host time with graphs and without
seam   A through hooks and roles against the same engine with its policy wired in by hand
online 20, 26 and 32 requests/s of online.py's load, beside vLLM
mixed  the step of online.py that holds a chunk and 64 decodes: what the host and the GPU take

Every engine runs in its own process with random weights; the first repeat warms up and is not counted. A peer
is any of vllm, nano (nano-vLLM) and sglang; PYTHONPATH is where it is found, "" where it is installed.
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
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "experiments"))

import online  # noqa: E402
from cards import on_cards  # noqa: E402
from roofline import SHAPES, floor  # noqa: E402

from plugins.workloads.nano_bench import requests  # noqa: E402

MODEL = {
    "A": "0.6B",
    "B": "8B",
    "C": "8B",
    "D": "8B",
    "decode": "8B",
    "seam": "0.6B",
    "online": "8B",
    "mixed": "8B",
}
RATES = (20, 26, 32)  # requests/s of `online`
GOALS = {
    "A": {"vllm": 1.2, "nano": 1.35, "roofline": 0.75},
    "B": {"vllm": 1.12, "nano": 1.2, "roofline": 0.80},
}
LOAD = 0.8  # of the saturated rate, in C
# the host's parts of a step, seconds, as `profiled` names them
HOST = ("policy", "prepare", "launch", "collect", "rest")
FULL = (241, 256)  # running requests in a full step: what the peers' host cost was taken at


# ---- workers: one engine, one process --------------------------------------------------------------------


def report(**result: Any) -> None:
    print("RESULT " + json.dumps(result), flush=True)


def kernel_choice(text: str) -> dict[str, Any]:
    """ "flash_attn,decode=triton" -> a kernels choice, with graphs unless "eager" is one of the words."""
    name, *fields = text.split(",")
    return {"name": name, "cuda_graphs": "eager" not in fields} | dict(
        field.split("=") for field in fields if field != "eager"
    )


def ours(model: str, kernels: str, **options: Any) -> Any:
    from headway import LLM

    defaults = {
        "kernels": kernel_choice(kernels),
        "scheduler": "fcfs",
        "cache": "hash",
        "max_model_len": 4096,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 16384,
        "max_inflight": 2,
        "block_size": 256,
    }
    return LLM(model, load_format="dummy", **SHAPES[model], **(defaults | options))


def saturated(generate: Any, repeats: int, engine: str) -> None:
    """`generate(prompts, lengths)` -> tokens made. Reports output tokens/s; the first repeat is the
    warm-up."""
    for repeat in range(repeats + 1):
        prompts, lengths = requests(repeat)
        start = time.perf_counter()
        done = generate(prompts, lengths)
        seconds = time.perf_counter() - start
        assert done == sum(lengths), (done, sum(lengths))
        report(engine=engine, repeat=repeat, seconds=seconds, tokens=done)


def work_headway(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    {
        "A": ours_saturated,
        "B": ours_saturated,
        "C": ours_open,
        "D": ours_prefix,
        "decode": ours_decode,
        "seam": ours_seam,
        "online": ours_online,
        "mixed": ours_mixed,
    }[args.workload](args)
    print(f"worker took {time.perf_counter() - began:.1f} s", flush=True)


def sampling(length: int) -> Any:
    from headway import SamplingParams

    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length)


def run_ours(llm: Any, prompts: list[list[int]], lengths: list[int]) -> int:
    return sum(len(r.outputs[0].token_ids) for r in llm.generate(prompts, [sampling(n) for n in lengths]))


def ours_saturated(args: argparse.Namespace) -> None:
    llm = ours(MODEL[args.workload], args.kernels)
    saturated(lambda prompts, lengths: run_ours(llm, prompts, lengths), args.repeats, "headway")
    report(engine="headway", kv_blocks=llm.engine.pool.num_blocks)
    steps = profiled(llm, lambda: run_ours(llm, *requests(args.repeats + 1)))
    decode = [s for s in steps if s["decode"]]
    total = {k: sum(s.get(k, 0.0) for s in decode) for k in ("gpu", "gpu_idle", *HOST)}
    full = [s for s in decode if FULL[0] <= s["seqs"] <= FULL[1]]
    report(
        engine="headway",
        profile=True,
        idle_share=total["gpu_idle"] / (total["gpu"] + total["gpu_idle"]),
        decode_steps=len(decode),
        host_us=host_us(decode),
        full_steps=len(full),
        full_host_us=host_us(full),
        step_ms={k: v / len(decode) * 1e3 for k, v in total.items()},
        prompt_s=sum(s["gpu"] + s.get("gpu_idle", 0.0) for s in steps if not s["decode"]),
        by_batch=by_batch(decode),
    )


def host_us(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds a running request and step: each part of the host's work, and their sum."""
    running = sum(s["seqs"] for s in steps)
    parts = {k: sum(s.get(k, 0.0) for s in steps) / running * 1e6 if steps else 0.0 for k in HOST}
    return {"host": sum(parts.values())} | parts


def by_batch(decode: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Batch size class -> [steps, mean GPU ms, mean idle ms, mean host ms, planning and book-keeping in us
    per request]."""
    table = {}
    for low, high in ((1, 1), (2, 4), (5, 16), (17, 64), (65, 128), (129, 192), (193, 256)):
        chosen = [s for s in decode if low <= s["seqs"] <= high]
        if chosen:
            mean = lambda key, among=chosen: statistics.fmean(s.get(key, 0.0) for s in among) * 1e3  # noqa: E731
            host = sum(mean(part) for part in HOST)
            policy = host_us(chosen)["policy"]
            table[f"{low}-{high}"] = [
                len(chosen),
                round(mean("gpu"), 3),
                round(mean("gpu_idle"), 4),
                round(host, 3),
                round(policy, 2),
            ]
    return table


def profiled(llm: Any, call: Any) -> list[dict[str, Any]]:
    """One more repeat that is profiled: every step's breakdown, seconds."""
    steps: list[dict[str, Any]] = []

    class Collector:
        def __init__(self) -> None:
            self.last = 0.0

        def on_start(self, engine: Any) -> None:
            self.last = time.perf_counter()

        def on_step(self, record: Any) -> None:
            now = time.perf_counter()
            plan, known = record.plan, record.timings
            row = {
                "decode": plan.num_tokens == len(plan.requests),
                "seqs": len(plan.requests),
                "policy": record.policy_time,
                **known,
            }
            # What is left of the turn once every part that is timed is taken out: the loop itself and the
            # clock. A turn plans and launches the next step and collects this one, so one step's value is off
            # by what the two differ; a mean is not.
            timed = sum(known.get(k, 0.0) for k in ("prepare", "launch", "wait", "collect", "profile"))
            row["rest"] = now - self.last - record.policy_time - timed
            steps.append(row)
            self.last = time.perf_counter()  # what this observer took is no part of a step

        def on_requests(self, finished: Any) -> None: ...
        def close(self, result: Any) -> None: ...

    llm.engine.executor.execution.profile = True
    llm.engine.observers.append(Collector())
    call()
    llm.engine.observers.pop()
    llm.engine.executor.execution.profile = False
    return steps


def ours_open(args: argparse.Namespace) -> None:
    """C: every repeat draws its own arrival times."""
    from headway import Arrival

    llm = ours("8B", args.kernels, scheduler=args.scheduler or {"name": "chunked", "token_budget": 2048})
    run_ours(llm, *requests(0))
    for repeat in range(1, args.repeats + 1):
        prompts, lengths = requests(repeat)
        rng, at = Random(repeat), 0.1
        arrivals = []
        for prompt, length in zip(prompts, lengths, strict=True):
            at += rng.expovariate(args.rate)
            arrivals.append(Arrival(at, prompt, sampling(length)))
        done = llm.engine.run(arrivals).outputs
        ttft = sorted(o.token_times[0] - o.arrival_time for o in done)
        tpot = sorted((o.token_times[-1] - o.token_times[0]) / (len(o.token_times) - 1) for o in done)
        named = {"ttft": ttft, "tpot": tpot}
        figures = {
            f"{name}_p{q}": values[min(len(values) - 1, q * len(values) // 100)]
            for name, values in named.items()
            for q in (50, 99)
        }
        report(engine="headway", repeat=repeat, rate=args.rate, **figures)


def ours_prefix(args: argparse.Namespace) -> None:
    """D: the first request that has the prefix is answered, then the other 99 come at once."""
    for cache in ("none", "hash"):
        llm = ours("8B", args.kernels, cache=cache, block_size=16)
        for repeat in range(args.repeats + 1):
            rng = Random(repeat)
            draw = lambda n, rng=rng: [rng.randint(0, 10000) for _ in range(n)]  # noqa: E731
            head = draw(416)  # 80% of 512, rounded up to a block
            prompts = [head + draw(96) for _ in range(70)] + [draw(512) for _ in range(30)]
            rest = prompts[1:]
            rng.shuffle(rest)
            planned = llm.engine.counts.planned_tokens
            start = time.perf_counter()
            made = run_ours(llm, prompts[:1], [args.output_len]) + run_ours(llm, rest, [args.output_len] * 99)
            seconds = time.perf_counter() - start
            computed = llm.engine.counts.planned_tokens - planned - (made - 100)
            report(
                engine="headway",
                cache=cache,
                repeat=repeat,
                seconds=seconds,
                saved=1 - computed / (100 * 512),
            )
        llm.close()
        del llm


def ours_decode(args: argparse.Namespace) -> None:
    """One request of 128 tokens answers 256: a step's seconds, and the host's part of it, with graphs and
    without."""
    for graphs in (True, False):
        llm = ours(
            "8B", args.kernels + ("" if graphs else ",eager"), max_num_seqs=8, max_num_batched_tokens=2048
        )
        for repeat in range(args.repeats + 1):
            one_request(llm, graphs, repeat)
        llm.close()
        del llm


def one_request(llm: Any, graphs: bool, repeat: int) -> None:
    prompt = requests(repeat)[0][0][:100]
    start = time.perf_counter()
    run_ours(llm, [prompt], [256])
    wall = time.perf_counter() - start
    steps = [s for s in profiled(llm, lambda: run_ours(llm, [prompt], [64])) if s["decode"]][8:]
    ms = {
        key: statistics.median(s.get(key, 0.0) for s in steps) * 1e3
        for key in ("gpu", "prepare", "launch", "collect")
    }
    # the executor's part; planning is the same with graphs and without
    host = ms["prepare"] + ms["launch"] + ms["collect"]
    report(
        engine="headway",
        graphs=graphs,
        repeat=repeat,
        step_ms=wall / 256 * 1e3,
        gpu_ms=ms["gpu"],
        launch_ms=ms["launch"],
        host_ms=host,
    )


def ours_seam(args: argparse.Namespace) -> None:
    """A, alternately as it is and with a policy double in the engine's place of policies."""
    from wired_policy import wire

    llm = ours("0.6B", args.kernels)
    run_ours(llm, *requests(0))
    for repeat in range(1, args.repeats + 1):
        for wired in (False, True):
            undo = wire(llm.engine) if wired else None
            start = time.perf_counter()
            made = run_ours(llm, *requests(2 * repeat + wired))
            report(
                engine="headway", wired=wired, repeat=repeat, seconds=time.perf_counter() - start, tokens=made
            )
            if undo is not None:
                undo()


def online_engine(args: argparse.Namespace, budget: int) -> Any:
    return ours(
        "8B",
        args.kernels,
        scheduler={"name": "chunked", "token_budget": budget},
        block_size=online.BLOCK_SIZE,
        num_blocks=online.BLOCKS,
        max_model_len=online.CONTEXT,
        max_num_batched_tokens=max(budget, 8192),
    )


def ours_online(args: argparse.Namespace) -> None:
    llm = online_engine(args, online.BUDGET)
    online.headway_first(llm, report)
    online.headway_online(llm, RATES, args.repeats, report)


def ours_mixed(args: argparse.Namespace) -> None:
    llm = online_engine(args, online.CHUNK + online.DECODES)
    for repeat in range(args.repeats + 1):
        steps = profiled(llm, lambda repeat=repeat: online.mixed_steps(llm, repeat))
        full = [s for s in steps if not s["decode"] and s["seqs"] >= online.DECODES]
        parts = ("gpu", "gpu_idle", *HOST)
        report(
            engine="headway",
            repeat=repeat,
            steps=len(full),
            ms={k: statistics.median(s.get(k, 0.0) for s in full) * 1e3 for k in parts},
        )
    report(engine="headway", span_over_kernels=online.span_over_kernels(llm, args.repeats + 1))


def peer_directory(model: str) -> str:
    """config.json and a word tokenizer, as a checkpoint has them; the weights are made in the process."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path, shape = Path(tempfile.gettempdir()) / f"headway-bench-{model}", SHAPES[model]
    path.mkdir(exist_ok=True)
    vocab = {
        word: i
        for i, word in enumerate(["<s>", "</s>", "<unk>", *(f"t{i}" for i in range(3, shape["vocab_size"]))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    config = {k: v for k, v in shape.items() if k not in ("architecture", "dtype")} | {
        "architectures": [shape["architecture"]],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": shape["dtype"],
        "initializer_range": 0.02,
        "rope_scaling": None,
    }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def work_vllm(args: argparse.Namespace) -> None:
    if args.workload == "online":
        online.vllm_online(peer_directory("8B"), RATES, args.repeats, report)
        return
    from vllm import LLM, SamplingParams

    llm = LLM(peer_directory(MODEL[args.workload]), max_model_len=4096, load_format="dummy")

    def generate(prompts: list[list[int]], lengths: list[int]) -> int:
        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in lengths]
        return sum(
            len(r.outputs[0].token_ids)
            for r in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        )

    saturated(generate, args.repeats, "vllm")


def work_nano(args: argparse.Namespace) -> None:
    import torch
    from nanovllm import LLM, SamplingParams

    llm = LLM(peer_directory(MODEL[args.workload]), enforce_eager=False, max_model_len=4096)
    # it has no random initialisation of its own
    for name, parameter in llm.model_runner.model.named_parameters():
        with torch.no_grad():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)

    def generate(prompts: list[list[int]], lengths: list[int]) -> int:
        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in lengths]
        return sum(len(r["token_ids"]) for r in llm.generate(prompts, params, use_tqdm=False))

    saturated(generate, args.repeats, "nano")


def work_sglang(args: argparse.Namespace) -> None:
    import sglang

    llm = sglang.Engine(
        model_path=peer_directory(MODEL[args.workload]),
        load_format="dummy",
        attention_backend="fa3",
        sampling_backend="pytorch",
        context_length=4096,
        mem_fraction_static=0.85,
        max_running_requests=512,
        log_level="warning",
    )

    def generate(prompts: list[list[int]], lengths: list[int]) -> int:
        params = [{"temperature": 0.6, "ignore_eos": True, "max_new_tokens": n} for n in lengths]
        return sum(
            r["meta_info"]["completion_tokens"]
            for r in llm.generate(input_ids=prompts, sampling_params=params)
        )

    saturated(generate, args.repeats, "sglang")
    llm.shutdown()


WORKERS = {"headway": work_headway, "vllm": work_vllm, "nano": work_nano, "sglang": work_sglang}


# ---- the driver ------------------------------------------------------------------------------------------


def run_worker(
    engine: str, workload: str, args: argparse.Namespace, path: str | None = None, gpu: str = "", **extra: Any
) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        __file__,
        "--worker",
        engine,
        "--workload",
        workload,
        "--repeats",
        str(args.repeats),
        "--kernels",
        args.kernels,
    ]
    for name, value in extra.items():
        command += [f"--{name}", str(value)]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", VLLM_USE_FLASHINFER_SAMPLER="0", PYTHONUNBUFFERED="1")
    if path is not None:
        environment["PYTHONPATH"] = path  # its own and nothing of ours
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.timeout)
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    print(
        f"-- {engine} {workload}{f' on GPU {gpu}' if gpu else ''}: {len(results)} results, "
        f"{time.perf_counter() - began:.0f} s, exit {done.returncode}",
        flush=True,
    )
    if done.returncode or not results:
        print((done.stdout + done.stderr)[:4000], "\n...\n", (done.stdout + done.stderr)[-1500:], flush=True)
    return results


def engines_of(
    workload: str, args: argparse.Namespace, peers: Sequence[str]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Results of Headway and of these peers, one engine after the other, or as many at once as `--gpus`
    names, each on a card of its own."""
    engines = {"headway": None, **dict(peer.split("=", 1) for peer in peers)}
    jobs = {name: partial(run_worker, name, workload, args, path) for name, path in engines.items()}
    return on_cards(jobs, args.gpus)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.4g} ({min(values):,.4g} to {max(values):,.4g})"


def throughputs(results: list[dict[str, Any]]) -> list[float]:
    return [r["tokens"] / r["seconds"] for r in results if r.get("repeat")]


def compare(workload: str, args: argparse.Namespace, rates: dict[str, float], found: dict[str, Any]) -> None:
    least = floor(SHAPES[MODEL[workload]], rates)
    tokens = sum(requests(0)[1])
    print(
        f"\n{workload}: Qwen3-{MODEL[workload]} shape, {tokens:,} output tokens; roofline floor {least:.2f} "
        f"s = {tokens / least:,.0f} tok/s"
    )
    speeds: dict[str, float] = {}
    for engine, results in engines_of(workload, args, args.peer):
        found[f"{workload} {engine}"] = results
        values = throughputs(results)
        if not values:
            continue
        speeds[engine] = statistics.median(values)
        line = (
            f"   {engine:<8} {statistics.median(values):>9,.0f} tok/s ({min(values):,.0f} to "
            f"{max(values):,.0f}), {tokens / speeds[engine]:.2f} s"
        )
        if engine != "headway" and "headway" in speeds:
            ratio = speeds["headway"] / speeds[engine]
            least = GOALS[workload].get(engine, 0)
            line += f"; headway is {ratio:.3f}x ({met(ratio >= least)}: at least {least}x)"
        print(line, flush=True)
        for r in results:
            if r.get("profile"):
                full, mean = r["full_host_us"], r["host_us"]
                print(
                    f"      GPU idle share in decode {r['idle_share']:.2%} ({met(r['idle_share'] <= 0.03)}: "
                    "at most 3%)"
                )
                print(
                    f"      host us per running request, {FULL[0]} to {FULL[1]} running ({r['full_steps']} "
                    f"steps): {rounded(full)}"
                    f" ({met(0 < full['host'] <= 2)}: at most 2)"
                )
                print(
                    f"      host us per running request, all {r['decode_steps']} decode steps: "
                    f"{rounded(mean)} ({met(mean['host'] <= 2)}: at most 2)"
                )
                print(f"      mean decode step, ms: {rounded(r['step_ms'])}; prompts {r['prompt_s']:.3f} s")
                print(f"      batch: steps, GPU ms, idle ms, host ms, policy us per request: {r['by_batch']}")
            if "kv_blocks" in r:
                print(f"      {r['kv_blocks']:,} KV blocks")
    if "headway" in speeds:
        share = speeds["headway"] * least / tokens
        goal = GOALS[workload]["roofline"]
        print(f"   headway reaches {share:.1%} of the floor ({met(share >= goal)}: at least {goal:.0%})")


def met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def rounded(numbers: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())


def open_load(args: argparse.Namespace, found: dict[str, Any]) -> None:
    saturated_runs = [r["seconds"] for r in found.get("B headway", []) if r.get("repeat")]
    rate = args.rate or (LOAD * 256 / statistics.median(saturated_runs) if saturated_runs else 0)
    if not rate:
        print("\nC needs B before it, or --rate")
        return
    results = found["C headway"] = run_worker("headway", "C", args, rate=rate, scheduler=args.scheduler)
    print(
        f"\nC: Qwen3-8B shape, Poisson arrivals at {rate:.2f} requests/s, scheduler "
        f"{args.scheduler or 'chunked, 2,048 tokens per step'}"
    )
    for name, unit in (("ttft_p50", "s"), ("ttft_p99", "s"), ("tpot_p50", "s"), ("tpot_p99", "s")):
        if results:
            print(f"   {name} {spread([r[name] for r in results])} {unit}")


def prefix_test(args: argparse.Namespace, found: dict[str, Any]) -> None:
    results = found["D headway"] = run_worker("headway", "D", args, **{"output-len": args.output_len})
    seconds = {
        c: [r["seconds"] for r in results if r["cache"] == c and r["repeat"]] for c in ("none", "hash")
    }
    if not all(seconds.values()):
        return
    saved = min(r["saved"] for r in results if r["cache"] == "hash" and r["repeat"])
    ratio = statistics.median(seconds["none"]) / statistics.median(seconds["hash"])
    print(
        f"\nD: Qwen3-8B shape, {args.output_len} output tokens: cache=none {spread(seconds['none'])} s, "
        f"cache=hash {spread(seconds['hash'])} s"
    )
    print(
        f"   {ratio:.2f}x ({met(ratio >= 1.78)}: at least 1.78x), {saved:.2%} of the prompt tokens saved "
        f"({met(saved >= 0.56)}: at least 56%)"
    )


def single_decode(args: argparse.Namespace, rates: dict[str, float], found: dict[str, Any]) -> None:
    from headway import ModelShape

    results = found["decode headway"] = run_worker("headway", "decode", args)
    model = ModelShape(**SHAPES["8B"])
    least = (
        (model.num_hidden_layers * model.layer_parameters + model.embedding_parameters)
        * model.dtype_bytes
        / rates["bandwidth"]
        * 1e3
    )
    counted = [r for r in results if r["repeat"]]
    names = ("step_ms", "gpu_ms", "launch_ms", "host_ms")
    pick = {
        g: {k: statistics.median(r[k] for r in counted if r["graphs"] is g) for k in names}
        for g in (True, False)
    }
    ratio, saved = pick[True]["step_ms"] / least, 1 - pick[True]["host_ms"] / pick[False]["host_ms"]
    print(f"\ndecode: one request, Qwen3-8B shape, weights over bandwidth {least:.2f} ms")
    print(f"   graphs {rounded(pick[True])}\n   eager  {rounded(pick[False])}")
    print(f"   {ratio:.3f}x the floor ({met(ratio <= 1.35)}: at most 1.35x)")
    print(
        f"   the executor's CPU time is {saved:.0%} below the step without graphs ({met(saved >= 0.6)}: at "
        "least 60%)"
    )


def seam(args: argparse.Namespace, found: dict[str, Any]) -> None:
    results = found["seam headway"] = run_worker("headway", "seam", args)
    roles, wired = ([r["seconds"] for r in results if r["wired"] is w] for w in (False, True))
    if roles and wired:
        cost = statistics.median(roles) / statistics.median(wired) - 1
        print(f"\nseam: A through hooks and roles {spread(roles)} s, policy wired in {spread(wired)} s")
        print(f"   the seam costs {cost:+.2%} ({met(cost < 0.01)}: less than 1%)")


def online_load(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Headway beside vLLM, per rate and figure."""
    medians: dict[tuple[str, int, str], float] = {}
    names = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms")
    print("\nonline: Qwen3-8B shape, chunked + hash, 2,048 tokens per step, 6,000 KV blocks of 16")
    peers = [peer for peer in args.peer if peer.startswith("vllm=")]
    for engine, results in engines_of("online", args, peers):
        found[f"online {engine}"] = results
        for r in results:
            if times := r.get("first_ttft_ms"):
                ratio = times[0] / times[9]
                print(f"   first token of each of 12 requests, ms: {', '.join(f'{t:.1f}' for t in times)}")
                print(f"   the first over the tenth: {ratio:.2f} ({met(ratio <= 1.2)}: at most 1.2)")
            if "late_preparations" in r:
                print(
                    f"   compiled or captured after the start: {r['late_preparations']} "
                    f"({met(not r['late_preparations'])}: 0)"
                )
        for rate in RATES:
            rows = [r for r in results if r.get("rate") == rate and r["repeat"]]
            for name in names if rows else ():
                values = [r[name] for r in rows]
                medians[engine, rate, name] = statistics.median(values)
                print(f"   {engine:<8} {rate} requests/s {name:<13} {spread(values)}")
    for (engine, rate, name), theirs in medians.items():
        if engine == "vllm" and name != "p99_tpot_ms":
            ratio = medians["headway", rate, name] / theirs
            print(f"   {rate} requests/s {name:<13} {ratio:.3f}x vLLM ({met(ratio <= 0.85)}: at most 0.85x)")


def mixed_step(args: argparse.Namespace, found: dict[str, Any]) -> None:
    results = found["mixed headway"] = run_worker("headway", "mixed", args)
    counted = [r for r in results if r.get("repeat")]
    if counted:
        ms = {k: statistics.median(r["ms"][k] for r in counted) for k in counted[0]["ms"]}
        print(
            f"\nmixed: {online.CHUNK} tokens of a prompt beside {online.DECODES} decodes, Qwen3-8B shape, "
            f"{counted[0]['steps']} steps"
        )
        print(f"   ms: {rounded(ms)}")
        print(f"   launch {ms['launch']:.2f} ms ({met(ms['launch'] <= 0.5)}: at most 0.5 ms)")
        ratio = results[-1]["span_over_kernels"]
        print(f"   {ratio:.3f}x its kernels' own times ({met(ratio <= 1.1)}: at most 1.1x)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["A", "B", "C", "D", "decode", "seam"])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHONPATH")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s of C")
    parser.add_argument("--scheduler", default="", help="of C")
    parser.add_argument("--output-len", type=int, default=16, help="of D")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a worker may take")
    parser.add_argument("--gpus", default="", help="numbers, as 0,1: engines that are compared run at once")
    parser.add_argument("--json", default="")
    parser.add_argument("--worker", default="")
    parser.add_argument("--workload", default="")
    args = parser.parse_args()
    if args.worker:
        WORKERS[args.worker](args)
        return
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import roofline; "
        "print(json.dumps(roofline.machine_rates()))"
    )
    rates = json.loads(
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    print(
        f"read {rates['read'] / 1e12:.2f} TB/s, copy {rates['copy'] / 1e12:.2f} TB/s, bf16 product "
        f"{rates['flops'] / 1e12:.0f} TFLOP/s"
    )
    found: dict[str, Any] = {"rates": rates}
    for workload in args.workloads:
        if workload in GOALS:
            compare(workload, args, rates, found)
        else:
            {
                "C": lambda: open_load(args, found),
                "D": lambda: prefix_test(args, found),
                "decode": lambda: single_decode(args, rates, found),
                "seam": lambda: seam(args, found),
                "online": lambda: online_load(args, found),
                "mixed": lambda: mixed_step(args, found),
            }[workload]()
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
