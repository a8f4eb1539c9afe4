"""Clients that compete: each with its own rate and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import takewhile
from operator import attrgetter
from random import Random
from typing import Any

from headway import (
    Arrival,
    SamplingParams,
    Tags,
    Workload,
    WorkloadError,
    hookimpl,
    near,
)

from .pace import arrival_times, length_range, random_prompt


@dataclass
class Clients(Workload):
    """Several clients, each with its own rate and lengths, for studies of fairness.

    The defaults are the overload of VTC's first experiment (Sheng et al., OSDI'24): 1.5 and 3 requests a second, evenly spaced, 256 tokens in
    and 256 out. A list with one entry holds for every client.
    """

    rates: list[float] = field(default_factory=lambda: [1.5, 3.0])  # requests a second, one entry a client
    input_lens: list[Any] = field(default_factory=lambda: [256])  # tokens: entries are a number or [low, high]
    output_lens: list[Any] = field(default_factory=lambda: [256])
    arrival: str = "uniform"  # or poisson, gamma
    burstiness: float = 1.0  # shape of gamma: below 1 is burstier than Poisson
    duration: float = 600.0  # seconds in which requests arrive
    temperature: float = 0.0
    max_tokens: int | None = None  # declared cap; None: up to the context

    def __post_init__(self) -> None:
        if self.arrival not in (processes := ("uniform", "poisson", "gamma")):
            raise WorkloadError(f"workload.arrival={self.arrival!r} is not known.{near(self.arrival, processes)}")
        if not self.rates or any(not rate > 0 for rate in self.rates):
            raise WorkloadError(f"workload.rates={self.rates}: expected a positive rate for each client")
        if not (self.duration > 0 and self.burstiness > 0):
            raise WorkloadError(f"workload.duration={self.duration}, workload.burstiness={self.burstiness}: expected positive numbers")
        self._input, self._output = self._spread("input_lens"), self._spread("output_lens")

    def _spread(self, name: str) -> list[tuple[int, int]]:
        entries = list(getattr(self, name))
        if len(entries) not in (1, len(self.rates)):
            raise WorkloadError(f"workload.{name} has {len(entries)} entries for {len(self.rates)} clients: give one, or one a client")
        return [length_range(name, entry) for entry in entries] * (len(self.rates) if len(entries) == 1 else 1)

    def arrivals(self, seed: int, vocab_size: int, max_model_len: int) -> Iterable[Arrival]:
        streams = [self._client(i, seed, vocab_size, max_model_len) for i in range(len(self.rates))]
        return merge(*streams, key=attrgetter("time"))

    def _client(self, i: int, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        rng, name = Random(f"{seed}/client{i}"), f"client{i}"
        sampling = SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)
        times = arrival_times(self.arrival, self.rates[i], self.burstiness, Random(f"{seed}/arrivals{i}"))
        for number, time in enumerate(takewhile(lambda t: t < self.duration, times)):
            prompt = random_prompt(rng, rng.randint(*self._input[i]), vocab_size, max_model_len)
            yield Arrival(time, prompt, sampling, rng.randint(*self._output[i]), f"{name}.{number}", Tags(client=name))


@hookimpl
def headway_register(registry):
    registry.add("workload", "clients", Clients)
