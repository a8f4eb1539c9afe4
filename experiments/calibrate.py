"""Measures what the engine's steps take on this machine, and fits the simulator's profile to them.

    python -m experiments.calibrate model=qwen3_8b hardware=h100 [parallel.tp=2] [--out FILE] [--repeats 2]

The words are run.py's. Runs bursts of decodes at several batch sizes and contexts, prompts of many lengths,
and both at once as an open load, and takes the chunks and the seconds of every step. What comes out
(plugins/executors/profile.py) is explainable: a few terms with seconds per unit. Its error is measured on
steps that the fit has not seen, a fifth of them at a time. A profile in conf/hardware/profiles is found by
`executor=sim` by itself; `executor=sim executor.profile=FILE` names one.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.cli import schema  # noqa: E402
from core.compose.build import Composition, Run, build  # noqa: E402
from core.compose.hooks import load_registry  # noqa: E402
from headway import Arrival, HeadwayError, Observer, SamplingParams, StepRecord  # noqa: E402
from plugins.executors.profile import Profile, write  # noqa: E402
from plugins.executors.step_fit import Sample, by_kind, fitted, profile_of_fits  # noqa: E402

FOLDER = ROOT / "conf" / "hardware" / "profiles"


class Steps(Observer):
    """The chunks and the seconds of every step since the last `take`."""

    plugin_name = "calibration"

    def __init__(self) -> None:
        self._seen: list[Sample] = []

    def on_step(self, record: StepRecord) -> None:
        if record.plan.requests:
            self._seen.append(
                (list(record.plan.starts), list(record.plan.lengths), record.end - record.start)
            )

    def take(self) -> list[Sample]:
        found, self._seen = self._seen, []
        return found


# ---- what is run -----------------------------------------------------------------------------------------


class Loads:
    """Bursts and open loads that fit the engine's limits, no two prompts alike."""

    def __init__(self, run: Run, seed: int) -> None:
        engine = run.engine
        self.rng, self.vocabulary = Random(seed), engine.executor.caps.vocab_size
        self.most_seqs, self.budget = engine.config.max_num_seqs, engine.config.max_num_batched_tokens
        self.longest, self.room = engine.max_model_len, engine.pool.num_blocks * engine.pool.block_size
        self._count = 0

    def all(self) -> Iterator[tuple[str, list[Arrival]]]:
        for batch in self.batches():
            for context in (64, 512, 2048):
                if context + 32 < self.longest and batch * (context + 48) < self.room:
                    yield f"{batch} decode at {context}", [self.ask(context, 24) for _ in range(batch)]
        for _ in range(12):
            count = self.rng.choice((1, 1, 2, 4, 8))
            yield "prompts", [self.ask(self.length(), 2) for _ in range(count)]
        for rate in (4.0, 10.0, 25.0, 60.0):
            yield f"{rate:g} requests/s", self.open(rate, 60)

    def batches(self) -> list[int]:
        sizes = [1 << power for power in range(12) if 1 << power < self.most_seqs]
        between = [3 * size // 2 for size in sizes if 8 <= size and 3 * size // 2 < self.most_seqs]
        return sorted({*sizes, *between, self.most_seqs})

    def open(self, rate: float, count: int) -> list[Arrival]:
        now, asks = 0.0, []
        for _ in range(count):
            now += self.rng.expovariate(rate)
            asks.append(self.ask(min(self.length(), self.longest // 2), self.rng.randint(8, 64), now))
        return asks

    def length(self) -> int:
        most = max(2, min(self.budget, self.longest, self.room // 8) - 80)
        return max(2, int(most ** self.rng.uniform(0.3, 1.0)))

    def ask(self, length: int, output: int, at: float = 0.0) -> Arrival:
        self._count += 1
        tokens = [self.rng.randrange(self.vocabulary) for _ in range(length)]
        sampling = SamplingParams(max_tokens=min(output, self.longest - length), ignore_eos=True)
        return Arrival(at, tokens, sampling, id=f"c{self._count}")


def measured(run: Run, repeats: int) -> list[Sample]:
    """The steps of every load, after one of all of them that is not counted."""
    steps, loads = Steps(), Loads(run, seed=0)
    run.engine.observers = [steps]
    samples: list[Sample] = []
    for repeat in range(repeats + 1):
        for name, arrivals in loads.all():
            run.engine.run(arrivals)
            found = steps.take()
            samples += found if repeat else []
            print(
                f"   {'warm-up' if not repeat else f'repeat {repeat}'}: {name}, {len(found)} steps",
                file=sys.stderr,
            )
    return samples


# ---- the profile ---------------------------------------------------------------------------------------


def profile_of(run: Run, samples: Sequence[Sample]) -> Profile:
    composition = run.composition
    sizes = graph_sizes(run)
    return profile_of_fits(
        {kind: fitted(own, sizes[kind]) for kind, own in by_kind(samples).items()},
        hardware=composition.hardware.name,
        shape=asdict(run.engine.executor.caps.model),
        tp=composition.parallel.tp,
        pp=composition.parallel.pp,
        made=made(run),
    )


def graph_sizes(run: Run) -> dict[str, list[int]]:
    """Tokens of the graphs of each kind of steps, smallest first; none where steps are not padded."""
    execution = execution_of(run)
    if execution is None or execution.runner.mixed_graphs is None:
        return {"decode": [], "mixed": []}
    from plugins.executors.torch.graphs import batch_sizes

    runner = execution.runner
    return {"decode": sorted(batch_sizes(runner.max_num_seqs)), "mixed": list(runner.mixed_graphs.tokens)}


def execution_of(run: Run) -> Any:
    """The real engine's; None for an executor that computes nothing."""
    return getattr(run.engine.executor, "execution", None)


def made(run: Run) -> dict[str, str]:
    """Where the numbers come from."""
    found = {
        "date": date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    try:
        import torch
    except ImportError:
        return found
    found["torch"] = str(torch.__version__)
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found | {"kernels": str(getattr(execution_of(run), "kernels", "none")).splitlines()[0]}


# ---- the command -----------------------------------------------------------------------------------------


def composed(words: Sequence[str]) -> Composition:
    composition = schema.composition(schema.composed(words))
    for role in ("tracking", "workload"):
        composition.choices.pop(role, None)
    return composition


def calibrate(words: Sequence[str], repeats: int = 2) -> Profile:
    """Raises HeadwayError for what run.py would refuse."""
    registry = load_registry()
    schema.register(registry)
    run = build(registry, composed(["cache=none", *words]))
    try:
        return profile_of(run, measured(run, repeats))
    finally:
        run.engine.executor.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as run.py takes them")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, help=f"default: {FOLDER.relative_to(ROOT)}/HARDWARE_MODEL_tpN.yaml"
    )
    args = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        profile = calibrate(args.words, args.repeats)
    except HeadwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    layers, hidden = profile.shape["num_hidden_layers"], profile.shape["hidden_size"]
    out = args.out or FOLDER / f"{profile.hardware}_{layers}x{hidden}_tp{profile.tp}.yaml"
    write(profile, out)
    print(f"{out}: {profile}; {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
