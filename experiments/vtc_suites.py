"""The suites of VTC's artifact (Sheng et al., OSDI'24; fair_bench/exp_suite.py), simulated, beside the
figures of its authors' logs.

    python experiments/vtc_suites.py [--suites eight_clients on_off short_long weighted] [--order vtc]

Composed as conf/experiment/vtc_fairness.yaml (Llama-2-7B on an A10G, 10,000 KV tokens), with the requests of
each suite. Two measures are printed: the largest difference of what any two clients have been served since
the beginning, once a second, and `service_difference` of docs/metrics.md, over intervals in which both are
backlogged. Requests are drawn here from the suites' parameters, not with the artifact's generator, so that
times differ from theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, count
from random import Random

import numpy as np

from core.cli import schema
from core.compose.build import build
from core.compose.hooks import load_registry
from core.inputs import Arrival, SamplingParams, Tags
from core.measure.fairness import ClientService, by_client, service_difference
from core.outputs import RunResult
from core.outside import Observer, StepRecord


def ask(client: int, number: int, time: float, prompt: int, output: int) -> Arrival:
    rng = Random(f"{client}/{number}")
    tokens = rng.choices(range(3, 32000), k=prompt)
    sampling = SamplingParams(max_tokens=output)
    return Arrival(
        time, tokens, sampling, output, id=f"client{client}.{number}", tags=Tags(client=f"client{client}")
    )


def uniform(rates: list[float], seconds: float, on: float | None = None) -> Iterator[Arrival]:
    """Evenly spaced, 256 tokens in and out; the first client asks in every other spell of `on` seconds alone,
    if given."""
    for client, rate in enumerate(rates):
        phase = Random(f"phase/{client}").random() / rate
        for number in count():
            time = phase + (number + 1) / rate
            if time >= seconds:
                break
            if on is None or client or int(time // on) % 2 == 0:
                yield ask(client, number, time, 256, output=256)


def short_long(rates: tuple[float, float], seconds: float, lengths: tuple[int, int]) -> Iterator[Arrival]:
    """Poisson; the first client has long prompts and short answers, the second the reverse."""
    short, long = lengths
    for client, (rate, prompt, output) in enumerate(zip(rates, (long, short), (short, long), strict=True)):
        rng, time = Random(f"poisson/{client}"), 0.0
        for number in count():
            time += rng.expovariate(rate)
            if time >= seconds:
                break
            yield ask(client, number, time, prompt, output=output)


@dataclass(frozen=True)
class Suite:
    """Requests of one of the artifact's suites, and what its authors' logs say."""

    called: str  # there
    seconds: float
    arrivals: Callable[[float], Iterator[Arrival]]
    theirs: str
    weights: dict[str, float] = field(default_factory=dict)


SUITES = {
    "eight_clients": Suite("overload-multi", 360.0, lambda s: uniform([0.4] * 3 + [0.6] * 5, s), "3,601"),
    "on_off": Suite("on_off_overload", 600.0, lambda s: uniform([2.0, 3.0], s, on=60.0), "8,820"),
    "short_long": Suite(
        "poisson_short_long_2", 600.0, lambda s: short_long((8.0, 1.5), s, (32, 512)), "20,025"
    ),
    "weighted": Suite(
        "overload-weighted",
        360.0,
        lambda s: uniform([0.8, 0.8, 1.2, 1.6], s),
        "1 : 2.00 : 3.00 : 4.01",
        weights={f"client{i}": i + 1.0 for i in range(4)},
    ),
}


class Until(Observer):
    """Ends the run when so many seconds are over: what waits then is not waited for."""

    plugin_name = "until"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step(self, record: StepRecord) -> None:
        if record.end >= self.seconds:
            raise KeyboardInterrupt


def served(suite: Suite, seconds: float, *overrides: str) -> tuple[list[ClientService], RunResult]:
    """What each client was served in the first so many seconds of a suite, and all of the run."""
    registry = load_registry()
    schema.register(registry)
    given = ["experiment=vtc_fairness", "tracking=none", *overrides]
    if suite.weights:
        given.append(
            f"order.weights={{{','.join(f'{name}:{weight}' for name, weight in suite.weights.items())}}}"
        )
    composition = schema.composition(schema.composed(given))
    engine = build(registry, composition, observers=[Until(seconds)]).engine
    result = engine.run(sorted(suite.arrivals(seconds), key=lambda arrival: arrival.time))
    return [service for _, service in sorted(by_client(result.outputs).items())], result


def since_the_beginning(clients: list[ClientService], seconds: float) -> float:
    """The largest difference between two clients' service, looked at once a second."""
    at = np.arange(0.0, seconds, 1.0)
    got = [client.service(at) for client in clients]
    return max(float(np.abs(one - other).max()) for one, other in combinations(got, 2))


def shares(clients: list[ClientService], seconds: float) -> list[float]:
    """What each was served, the first one's as 1."""
    got = [float(client.service(seconds)) for client in clients]
    return [service / got[0] for service in got]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--order", default="vtc")
    args = parser.parse_args()
    print(
        f"{'suite':<15}{'artifact':<22}{'theirs':>24}{'since 0':>12}{'backlogged':>12}{'preempted':>11}   "
        "shares"
    )
    for name in args.suites:
        suite = SUITES[name]
        clients, result = served(suite, suite.seconds, f"order={args.order}")
        largest, backlogged = since_the_beginning(clients, suite.seconds), service_difference(clients)
        ratio = " : ".join(f"{share:.2f}" for share in shares(clients, suite.seconds))
        print(
            f"{name:<15}{suite.called:<22}{suite.theirs:>24}{largest:>12,.0f}{backlogged:>12,.0f}"
            f"{result.num_preemptions:>11}   {ratio}"
        )


if __name__ == "__main__":
    main()
