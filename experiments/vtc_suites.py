"""The suites of VTC's artifact (Sheng et al., OSDI'24; fair_bench/exp_suite.py), simulated, beside the logs
of its authors.

    python experiments/vtc_suites.py [--suites on_off short_long] [--order vtc] [--conditions "as theirs"]

The same as theirs: the requests, one by one (the artifact's generator with its seed, 42); the pool of 10,000
KV tokens; what a step costs (vtc_a10g.yaml, fitted to their logs by vtc_step_times.py); when requests may
start; and the measure. That is of the artifact's plots: a request's service, its prompt tokens and twice its
answer, is spread evenly from its first token to its last; every ten seconds until requests end to come, the
largest difference is taken of what any two clients have been served since the beginning. The other
conditions change one thing at a time. `backlogged` is `service_difference` of docs/metrics.md, over intervals
in which both clients are backlogged.

Of the artifact's two suites of short and long requests, the one whose lengths are 64 and 256 has a difference
of 20,025, and that of lengths 32 and 512 one of 41,484. The weighted suite is as in the config of its log,
whose first client asks half as often as in exp_suite.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.cli import schema
from core.compose.build import build
from core.compose.hooks import load_registry
from core.inputs import Arrival, SamplingParams, Tags
from core.measure.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, by_client, service_difference
from core.outputs import RequestOutput, RunResult
from core.outside import Observer, StepRecord

HERE = Path(__file__).resolve().parent
SEED = 42  # of the artifact's generator
EVERY = 10.0  # seconds between two looks
AFTERWARDS = 60.0  # seconds in which every request ends that has begun before the last look

#: What is like the authors' server (S-LoRA with their launch_server.py), and then all but one thing.
THEIRS = {
    "executor.profile": str(HERE / "vtc_a10g.yaml"),
    "scheduler.max_wait_tokens": "10",
    "engine.max_num_batched_tokens": "3072",
    "engine.max_num_seqs": "1000",
}
CONDITIONS = {
    "as theirs": THEIRS,
    "starts at any step": THEIRS | {"scheduler.max_wait_tokens": "0"},
    "blocks of 1 token": THEIRS | {"engine.block_size": "1", "engine.num_blocks": "10000"},
    "data sheet's speed": THEIRS | {"executor.profile": "none"},
    "our experiment": {},
}


class Ask(NamedTuple):
    time: float
    client: int
    prompt: int
    output: int


def uniform(rates: Sequence[float], seconds: float, on: float | None = None) -> list[Ask]:
    """Evenly spaced, 256 tokens in and out; the first client asks in every other spell of `on` seconds alone,
    if given."""
    rng = np.random.RandomState(SEED)
    asked = []
    for client, rate in enumerate(rates):
        rng.randint(256, 257, 2 * int(rate * seconds))  # lengths, of which there is one
        times = np.cumsum([rng.rand() / rate, *[1 / rate] * int(rate * seconds)])[1:]
        silent = on is not None and client == 0
        asked += [Ask(float(t), client, 256, 256) for t in times if not (silent and int(t // on) % 2)]
    return sorted(asked)


def poisson(rates: Sequence[float], seconds: float, lengths: Sequence[tuple[int, int]]) -> list[Ask]:
    """Each client has its prompt and answer length."""
    rng = np.random.RandomState(SEED)
    count = int(sum(rates) * seconds)
    clients = (rng.rand(count) > rates[0] / sum(rates)).astype(int)
    rng.randint(256, 257, 2 * count)
    times = np.cumsum(rng.gamma(1.0, 1 / sum(rates), count))
    return [Ask(float(t), int(c), *lengths[c]) for t, c in zip(times, clients, strict=True)]


@dataclass(frozen=True)
class Suite:
    """Requests of one of the artifact's suites, and what its authors' logs say."""

    called: str  # there
    seconds: float
    asked: list[Ask]
    difference: float | None  # theirs; None where clients are not meant to be served alike
    served: list[int]  # theirs, of each client at the end
    weights: dict[str, float] = field(default_factory=dict)


SUITES = {
    "overload": Suite("overload", 360.0, uniform([1.5, 3.0], 360.0), 7_947, [240_572, 241_920]),
    "on_off": Suite("on_off_overload", 600.0, uniform([2.0, 3.0], 600.0, on=60.0), 8_820, [392_829, 397_056]),
    "eight_clients": Suite(
        "overload-multi",
        360.0,
        uniform([0.4] * 3 + [0.6] * 5, 360.0),
        difference=3_601,
        served=[59_904, 59_136, 58_004, 58_772, 58_772, 59_284, 59_284, 59_904],
    ),
    "short_long": Suite(
        "poisson_short_long",
        600.0,
        poisson([8.0, 1.5], 600.0, [(64, 64), (256, 256)]),
        difference=20_025,
        served=[619_776, 601_180],
    ),
    "short_long_2": Suite(
        "poisson_short_long_2",
        600.0,
        poisson([8.0, 1.5], 600.0, [(512, 32), (32, 512)]),
        difference=41_484,
        served=[501_229, 460_407],
    ),
    "weighted": Suite(
        "overload-weighted",
        360.0,
        uniform([0.4, 0.8, 1.2, 1.6], 360.0),
        difference=None,
        served=[48_193, 96_450, 144_701, 193_223],
        weights={f"client{i}": i + 1.0 for i in range(4)},
    ),
}


def arrivals(asked: Iterable[Ask]) -> list[Arrival]:
    return [
        Arrival(
            time,
            [3 + number % 29_989] * prompt,
            SamplingParams(max_tokens=output),
            output,
            id=f"client{client}.{number}",
            tags=Tags(client=f"client{client}"),
        )
        for number, (time, client, prompt, output) in enumerate(asked)
    ]


class Until(Observer):
    """Ends the run when so many seconds are over: what waits then is not waited for."""

    plugin_name = "until"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step(self, record: StepRecord) -> None:
        if record.end >= self.seconds:
            raise KeyboardInterrupt


def run(suite: Suite, condition: str = "as theirs", *overrides: str) -> RunResult:
    """experiment=vtc_fairness with the suite's requests, until all that have begun in its time have ended."""
    registry = load_registry()
    schema.register(registry)
    given = ["experiment=vtc_fairness", "tracking=none"]
    given += [f"{name}={value}" for name, value in CONDITIONS[condition].items()]
    if suite.weights:
        given.append(
            f"order.weights={{{','.join(f'{name}:{weight}' for name, weight in suite.weights.items())}}}"
        )
    composition = schema.composition(schema.composed([*given, *overrides]))
    engine = build(registry, composition, observers=[Until(suite.seconds + AFTERWARDS)]).engine
    return engine.run(arrivals(suite.asked))


def served(outputs: Iterable[RequestOutput], seconds: float) -> np.ndarray:
    """Of each client a row, by name: its service since the beginning, every ten seconds, as the artifact's
    plots have it."""
    at = np.arange(0.0, seconds + 1, EVERY)[:, None]
    rows = []
    for _, client in sorted(by_client(outputs).items()):
        answers = [
            (o.token_times[0], o.token_times[-1], o.num_prompt_tokens, len(o.token_times))
            for o in client.outputs
            if len(o.token_times) > 1
        ]
        first, last, prompt, output = np.array(answers).reshape(-1, 4).T
        amount = PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        rows.append((np.clip((at - first) / (last - first), 0.0, 1.0) * amount).sum(axis=1))
    return np.array(rows)


def difference(service: np.ndarray) -> float:
    return float((service.max(axis=0) - service.min(axis=0)).max())


def row(suite: Suite, result: RunResult) -> str:
    service = served(result.outputs, suite.seconds)
    end = service[:, -1]
    shares = " : ".join(f"{share:.2f}" for share in end / end[0])
    return (
        f"{difference(service):>12,.0f}{service_difference(list(by_client(result.outputs).values())):>12,.0f}"
        f"{result.num_preemptions:>11}{end.sum():>12,.0f}   {shares}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--order", default="vtc")
    args = parser.parse_args()
    print(f"{'':<22}{'difference':>12}{'backlogged':>12}{'preempted':>11}{'served':>12}   shares")
    for name in args.suites:
        suite = SUITES[name]
        most = "" if suite.difference is None else f"{suite.difference:,}"
        shares = " : ".join(f"{amount / suite.served[0]:.2f}" for amount in suite.served)
        print(f"\n{name} ({suite.called}, {suite.seconds:.0f} s)")
        print(f"{'  theirs':<22}{most:>12}{'':>12}{0:>11}{sum(suite.served):>12,}   {shares}")
        for condition in args.conditions:
            print(f"{'  ' + condition:<22}{row(suite, run(suite, condition, f'order={args.order}'))}")


if __name__ == "__main__":
    main()
