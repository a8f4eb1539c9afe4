"""Clients that compete: each with its own rate and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile
from operator import attrgetter
from random import Random

from headway import (
    Arrival,
    Registry,
    SamplingParams,
    Tags,
    WorkloadError,
    hookimpl,
    param,
)

from .mix import Mix
from .pace import LONGEST, arrival_times, length_range, random_prompt


@dataclass
class Clients(Mix):
    """Several clients, each with its own rate and lengths, for studies of fairness.

    The defaults are the overload of VTC's first experiment (Sheng et al., OSDI'24): 1.5 and 3 requests a
    second, evenly spaced, 256 tokens in and 256 out. A list with one entry holds for every client.
    """

    rates: list[float] = param(
        [1.5, 3.0],
        min=1e-6,
        max=1e6,
        unit="requests a second",
        doc="one entry for each client",
    )
    input_lens: list[int | list[int]] = param(
        [256],
        min=1,
        max=LONGEST,
        unit="tokens",
        doc="entries are a number or [low, high]",
    )
    output_lens: list[int | list[int]] = param([256], min=1, max=LONGEST, unit="tokens")
    arrival: str = param("uniform", choices=("uniform", "poisson", "gamma"))
    burstiness: float = param(1.0, min=1e-3, max=1e6, doc="shape of gamma: below 1 is burstier than Poisson")
    duration: float = param(600.0, above=0, max=1e9, unit="seconds", doc="in which requests arrive")
    temperature: float = param(0.0, min=0, max=1e6)
    max_tokens: int | None = param(
        None,
        min=1,
        max=2**31 - 1,
        unit="tokens",
        doc="declared cap; None: up to the context",
    )

    def __post_init__(self) -> None:
        if not self.rates:
            raise WorkloadError("workload.rates=[]: expected a rate for each client, and at least one client")
        self._input, self._output = self._spread("input_lens"), self._spread("output_lens")

    def _spread(self, name: str) -> list[tuple[int, int]]:
        entries = list(getattr(self, name))
        if len(entries) not in (1, len(self.rates)):
            raise WorkloadError(
                f"workload.{name}={entries}: expected one entry, or one for each of the {len(self.rates)} "
                "clients"
            )
        return [length_range(name, entry) for entry in entries] * (
            len(self.rates) if len(entries) == 1 else 1
        )

    def arrivals(self, seed: int, vocab_size: int, max_model_len: int) -> Iterable[Arrival]:
        streams = [self._client(i, seed, vocab_size, max_model_len) for i in range(len(self.rates))]
        return self.mixed(merge(*streams, key=attrgetter("time")), seed)

    def _client(self, i: int, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        rng, name = Random(f"{seed}/client{i}"), f"client{i}"
        sampling = SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)
        times = arrival_times(self.arrival, self.rates[i], self.burstiness, Random(f"{seed}/arrivals{i}"))
        for number, time in enumerate(takewhile(lambda t: t < self.duration, times)):
            prompt = random_prompt(rng, rng.randint(*self._input[i]), vocab_size, max_model_len)
            yield Arrival(
                time,
                prompt,
                sampling,
                rng.randint(*self._output[i]),
                id=f"{name}.{number}",
                tags=Tags(client=name),
            )


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "clients", Clients)
