"""Decision hashes of compositions, which a refactoring leaves as they are: scheduler=chunked with every order
x cache x eviction x victim, every other scheduler with every order x cache x victim and an eviction drawn for
it.

    python -m tests.helpers.recorded_decisions           the whole set (a few minutes); names rows that differ
    python -m tests.helpers.recorded_decisions --write   records it again, after decisions changed on purpose

A row is one (scheduler, order, cache, eviction) over all victims, or one run of the real engine on a tiny
model. Other roles, limits and requests come from a generator seeded with the row's name: rows differ in all
of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

from headway import (
    SLO,
    Arrival,
    EngineConfig,
    KeyOrder,
    ModelConfig,
    Request,
    RequestState,
    SamplingParams,
    Tags,
)

from .policy_runs import REGISTRY, Server, compose

RECORD = Path(__file__).with_suffix(".json")
SIMULATED = "simulated"
TORCH = "torch"
SAMPLING = SamplingParams(max_tokens=24)
# schedulers with a token budget of their own
BUDGETED = ("chunked", "preemptive", "selective", "running_first", "jitserve")
# schedulers that rank running requests as well, and refuse orders that do not
RANKED = ("preemptive", "selective", "jitserve")
PAUSING = ("preemptive", "jitserve")  # nobody else needs a victim among the paused
OTHER_NAMES = ("fcfs",)  # of schedulers that are there under another one


@dataclass
class Pipeline(Server):
    """A server that must see a token before it can compute the next one of the same request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.caps = replace(self.caps, placeholders=False)


# ---- simulated runs --------------------------------------------------------------------------------------


def simulated_rows() -> Iterator[str]:
    for scheduler in REGISTRY.names("scheduler"):
        if scheduler in OTHER_NAMES:
            continue
        for order in REGISTRY.names("order"):
            if scheduler in RANKED and not issubclass(factory_of(order), KeyOrder):
                continue
            for prefixes in REGISTRY.names("cache"):
                for eviction in evictions(scheduler, order, prefixes):
                    yield f"{SIMULATED} {scheduler} {order} {prefixes} {eviction}"


def evictions(scheduler: str, order: str, prefixes: str) -> list[str]:
    if prefixes == "none":
        return ["lru"]
    names = REGISTRY.names("eviction")
    return names if scheduler == "chunked" else [Random(f"{scheduler} {order} {prefixes}").choice(names)]


def factory_of(order: str) -> Any:
    return REGISTRY.get("order", order).factory


def arrivals(rng: Random, count: int = 14) -> list[Arrival]:
    """Shared prefixes, several clients, priorities and deadlines, in bursts."""
    heads = [[rng.randrange(50) for _ in range(rng.choice((8, 13, 20)))] for _ in range(3)]
    found, now = [], 0.0
    for i in range(count):
        now += rng.choice((0.0, 0.0, 0.01, 0.05))
        head = rng.choice(heads)[: rng.randrange(4, 21)]
        prompt = head + [rng.randrange(50) for _ in range(rng.randrange(1, 10))]
        tags = Tags(
            client=rng.choice("abc"),
            session=f"s{i}",
            category=rng.choice(("chat", "api")),
            priority=rng.randrange(3),
            tool=rng.choice(("", "search")),
        )
        slo = SLO(ttft=rng.choice((0.05, 0.5)), tpot=0.05)
        answer = rng.randrange(1, 16)
        found.append(Arrival(now, prompt, SAMPLING, output_len=answer, tags=tags, slo=slo))
    return found


def next_turn(request: Request, now: float) -> Iterator[Arrival]:
    """Every third session goes on once, with all that was said so far."""
    third = int(request.tags.session[1:]) % 3 == 0
    if request.state is RequestState.FINISHED and request.tags.turn == 0 and third:
        prompt, tags = [*request.token_ids, *range(5)], replace(request.tags, turn=1)
        yield Arrival(now + 0.02, prompt, SAMPLING, output_len=6, tags=tags, slo=request.slo)


def simulated(row: str) -> str:
    """One digest of the decisions under every victim."""
    _, scheduler, order, prefixes, eviction = row.split()
    named = {"scheduler": scheduler, "order": order, "cache": prefixes, "eviction": eviction}
    digest = blake2b(digest_size=6)
    for victim in REGISTRY.names("victim"):
        if victim == "pause_first" and scheduler not in PAUSING:
            continue
        digest.update(_simulated(Random(f"{row} {victim}"), victim=victim, **named).encode())
    return digest.hexdigest()


def _simulated(rng: Random, **named: str) -> str:
    mode = rng.choice(("recompute", "drop_tail"))
    choices: dict[str, Any] = {**named, "victim": (named["victim"], {"mode": mode}), "predictor": "noisy"}
    if named["scheduler"] in BUDGETED:
        parameters = {"token_budget": rng.choice((48, 24)), "chunk_size": rng.choice((None, 8))}
        choices["scheduler"] = (named["scheduler"], parameters)
    optional = {
        "chunk": (None, ("fixed", {"chunk_size": 8})),
        "admission": (None, "always", "past_future", "peak_memory", "new_token_ratio"),
        "retention": (None, ("ttl", {}), "keep", "drop"),
    }
    choices |= {role: choice for role, among in optional.items() if (choice := rng.choice(among)) is not None}
    server = rng.choice((Server, Server, Pipeline))(overhead=0.01, per_token=0.0005, max_model_len=256)
    limits = EngineConfig(
        block_size=4,
        num_blocks=rng.choice((14, 20, 40)),
        max_num_seqs=rng.choice((3, 6)),
        max_num_batched_tokens=48,
        max_inflight=rng.choice((1, 2)),
    )
    engine = compose(server=server, seed=rng.randrange(100), engine=limits, **choices)
    result = engine.run(arrivals(rng), next_turn)
    assert result.status == "finished" and result.num_steps
    return result.decision_hash


# ---- the real engine on a tiny model ---------------------------------------------------------------------


def torch_rows() -> Iterator[str]:
    for scheduler in ("chunked", "fcfs", "pd_split"):
        for prefixes in REGISTRY.names("cache"):
            for depth in (1, 2):
                yield f"{TORCH} {scheduler} {prefixes} max_inflight={depth}"


@cache
def tiny() -> Any:
    from plugins.executors.torch import TorchExecutor
    from plugins.models.tiny import write_qwen3

    directory = Path(tempfile.mkdtemp(prefix="headway-test-")) / "tiny"
    write_qwen3(directory)
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(name_or_path=str(directory)))
    return executor


def on_torch(row: str) -> str:
    """Decisions with too few blocks for all. The requests arrive at once, so the clock has no influence."""
    _, scheduler, prefixes, depth = row.split()
    parameters = {"token_budget": 64, "chunk_size": 16} if scheduler in BUDGETED else {}
    limits = EngineConfig(
        block_size=4,
        num_blocks=22,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_inflight=int(depth.partition("=")[2]),
        check=True,
    )
    engine = compose(server=tiny(), engine=limits, scheduler=(scheduler, parameters), cache=prefixes)
    sampling = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    rng = Random(row)
    head = [rng.randrange(256) for _ in range(13)]
    tails = [[rng.randrange(256) for _ in range(rng.randrange(1, 12))] for _ in range(8)]
    prompts = [head[: rng.randrange(14)] + tail for tail in tails]
    result = engine.run([Arrival(0.0, prompt, sampling) for prompt in prompts])
    assert result.status == "finished" and result.num_steps
    return result.decision_hash[:12]


# ---- the record ------------------------------------------------------------------------------------------

RUNS: dict[str, Callable[[str], str]] = {SIMULATED: simulated, TORCH: on_torch}


def rows() -> list[str]:
    return [*simulated_rows(), *torch_rows()]


def decide(row: str) -> str:
    """The row's digest, now."""
    return RUNS[row.partition(" ")[0]](row)


def recorded() -> dict[str, str]:
    found: dict[str, str] = json.loads(RECORD.read_text())
    return found


def differences(names: Iterable[str], record: dict[str, str]) -> list[str]:
    """Rows of these whose decisions are not the recorded ones."""
    return [row for row in names if decide(row) != record.get(row, "absent")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="record what is decided now")
    parser.add_argument("--only", default="", help="rows that contain this text")
    args = parser.parse_args()
    names = [row for row in rows() if args.only in row]
    if args.write:
        record = (recorded() if args.only else {}) | {row: decide(row) for row in names}
        RECORD.write_text(json.dumps(record, indent=0) + "\n")
        print(f"{len(names)} rows recorded in {RECORD.name}")
        return 0
    differing = differences(names, recorded())
    print("\n".join(differing))
    print(f"{len(differing)} of {len(names)} rows are decided differently")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
