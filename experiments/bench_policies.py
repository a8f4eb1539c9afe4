"""What a policy costs: microseconds per step with it, of which how many are its own, at several numbers of
running and waiting requests.

    python experiments/bench_policies.py [--sizes 64x64 256x64 256x4096] [--steps 200] [--repeats 3] [--only
    order]

Every running request decodes, and none of the waiting ones can start, as in a server that is full: an order
is asked in every step for its first candidate, which is refused because every sequence is taken; admission
and chunk are asked too, so there it is refused for want of blocks. The executor emits tokens in no time, and
its cost model is the roofline of Llama-3.1-8B on an H200, so that `step_time` costs what it costs in
executor=sim. "own" is the difference to the baseline of the same kind: scheduler=chunked order=fcfs, radix
cache, nothing optional. Prompts have 512 tokens, from 8 clients and 32 sessions; where sequences are short,
half of them begin with one of 8 cached prefixes of 256 tokens. Only steps in which nobody starts or is
preempted count: others do other work than the baseline (nan: there was none). Victims are timed per call,
naming everybody. Times are CPU time of the thread, the best of the repeats.
"""

from __future__ import annotations

import argparse
import gc
import math
import platform
import time
from pathlib import Path
from typing import Any

import yaml

from core.compose.build import build_roles
from core.compose.hooks import load_registry
from core.policy import Need
from headway import (
    SLO,
    Arrival,
    Engine,
    EngineConfig,
    Hardware,
    ModelConfig,
    SamplingParams,
    Tags,
    VirtualExecutor,
    default_choices,
)
from plugins.executors.cost import Roofline

CONF = Path(__file__).resolve().parent.parent / "conf"
BASELINE = {role: name for role, (name, _) in default_choices(cache="radix").items()}
PROMPT, PREFIX = 512, 256  # tokens
STEP = 0.01  # virtual seconds; also a TPOT target, so that a dynamic chunk has to be searched
KEYED = ("priority", "sjf", "srpt", "edf", "least_slack", "ltr", "mlfq", "plas", "random")
LIMIT = 300.0  # us per step at 256 running, 64 waiting


def instant() -> VirtualExecutor:
    """A step takes no time until `overhead` says otherwise; its cost model is a real one."""
    executor = VirtualExecutor(overhead=0.0, max_model_len=1 << 20)
    shape = ModelConfig(**yaml.safe_load((CONF / "model" / "llama_3_1_8b.yaml").read_text())).shape()
    executor.cost_model = Roofline(
        shape, Hardware(**yaml.safe_load((CONF / "hardware" / "h200.yaml").read_text()))
    )
    return executor


def cases(registry: Any) -> list[dict[str, Any]]:
    """One composition a policy: the baseline with that policy, and what it needs."""
    found: list[dict[str, Any]] = [{}, {"admission": "none"}]
    found += [{"scheduler": "preemptive", "order": order} for order in KEYED]
    found += [{"order": order} for order in registry.names("order") if order != BASELINE["order"]]
    found += [{"order": "vtc", "clients": 4096}]
    found += [{role: name} for role in ("chunk", "admission") for name in registry.names(role)]
    found += [{"order": "sjf", "predictor": name} for name in registry.names("predictor") if name != "oracle"]
    return found


def compose(registry: Any, choice: dict[str, Any], running: int, waiting: int, steps: int) -> Engine:
    choice = dict(choice)
    clients = choice.pop("clients", 8)
    names = {role: name for role, name in (BASELINE | choice).items() if name != "none"}
    factories = [registry.get(role, name).factory for role, name in names.items()]
    if any("predictor" in f.requires for f in factories):
        names.setdefault("predictor", "oracle")
    roles, _ = build_roles(
        registry,
        {
            role: (name, {"token_budget": running + 4096} if role == "scheduler" else {})
            for role, name in names.items()
        },
    )
    executor = roles["executor"] = instant()
    if wants_blocks(choice):
        size = PROMPT + steps + 256  # one block a request holds all it will ever need
        config = EngineConfig(
            block_size=size,
            num_blocks=running,
            max_num_seqs=running + 8,
            max_num_batched_tokens=running + 4096,
        )
    else:
        blocks = (running + waiting) * (PROMPT + steps + 256) // 16
        config = EngineConfig(
            block_size=16, num_blocks=blocks, max_num_seqs=running, max_num_batched_tokens=running + 4096
        )
    engine = Engine(roles, config)

    def arrive(i: int, time: float) -> None:
        tags = Tags(client=f"c{i % clients}", session=f"s{i % 32}", priority=i % 4)
        head = [i // 2 % 8 + 1] * PREFIX if i % 2 else []
        prompt = head + [(i * 131 + j * 7) % 50000 for j in range(PROMPT - len(head))]
        slo = SLO(ttft=1e6, tpot=1e6 if i else STEP, e2el=1e7)  # the first one limits a dynamic chunk
        engine.add(
            Arrival(
                time,
                prompt,
                SamplingParams(max_tokens=None, ignore_eos=True),
                steps + 128,
                tags=tags,
                slo=slo,
            )
        )

    for i in range(running):
        arrive(i, 0.0)
    while len(engine.running) < running or any(r.num_new_tokens != 1 for r in engine.running):
        engine.step()
    # It has saved up slack in no time: that is used up, but for one step.
    first = next(iter(engine.running))
    executor.clock.advance_to(first.token_times[0] + (len(first.token_times) - 1) * STEP)
    executor.overhead = STEP
    for i in range(running, running + waiting):
        arrive(i, engine.clock.inner.now())
    for _ in range(3):
        engine.step()
    assert len(engine.running) == running and len(engine.waiting) == waiting, (
        len(engine.running),
        len(engine.waiting),
    )
    return engine


def wants_blocks(choice: dict[str, Any]) -> bool:
    """Whether the refusal must come from the blocks, because the sequence cap is checked before this role is
    asked."""
    return "admission" in choice or "chunk" in choice


def per_step(registry: Any, choice: dict[str, Any], running: int, waiting: int, steps: int) -> float:
    """Planning and book-keeping, callbacks included, microseconds per step."""
    engine = compose(registry, choice, running, waiting, steps)
    gc.collect()
    gc.disable()
    spent, quiet = 0.0, 0
    for _ in range(steps):
        before = engine.roster.num_preemptions, len(engine.waiting)
        began = time.thread_time()
        engine.step()
        ended = time.thread_time()
        if (engine.roster.num_preemptions, len(engine.waiting)) == before:
            spent, quiet = spent + ended - began, quiet + 1
    gc.enable()
    return spent / quiet * 1e6 if quiet else math.nan


def per_call(registry: Any, victim: str, running: int, calls: int) -> float:
    engine = compose(registry, {"victim": victim}, running, 1, 10)
    view = engine.view
    view.begin_step(10**6, engine.clock.inner.now(), 0)
    need = Need(view.running[0], 1)
    began = time.thread_time()
    for _ in range(calls):
        for _ in engine.roles.victim.victims(need, view):
            pass
    return (time.thread_time() - began) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["64x64", "256x64", "256x4096"], help="running x waiting"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="compositions that name this role or policy")
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    registry = load_registry()
    print(
        f"{platform.machine()}, Python {platform.python_version()}; CPU time, best of {args.repeats} x "
        f"{args.steps} steps, us per step (own)"
    )
    print(f"{'policy':44s}" + "".join(f"{f'({r}, {w})':>20s}" for r, w in sizes))
    base: dict[tuple[bool, tuple[int, ...]], float] = {}
    over: list[str] = []
    for choice in cases(registry):
        label = " ".join(f"{k}={v}" for k, v in choice.items()) or "baseline"
        if choice not in ({}, {"admission": "none"}) and args.only not in label:
            continue
        cells = ""
        for size in sizes:
            spent = min(per_step(registry, choice, *size, args.steps) for _ in range(args.repeats))
            own = spent - base.setdefault((wants_blocks(choice), size), spent)
            cells += f"{f'{spent:.0f} ({own:+.0f})':>20s}"
            if size == (256, 64) and own > LIMIT:
                over.append(f"{label}: {own:.0f} us")
        print(f"{label:44s}{cells}", flush=True)
    for victim in registry.names("victim"):
        if args.only in f"victim={victim}":
            cells = "".join(
                f"{min(per_call(registry, victim, r, 200) for _ in range(args.repeats)):>20.1f}"
                for r, _ in sizes
            )
            print(f"{f'victim={victim} (us per call)':44s}{cells}", flush=True)
    print(f"over {LIMIT:.0f} us at (256, 64): {'; '.join(over) or 'none'}")


if __name__ == "__main__":
    main()
