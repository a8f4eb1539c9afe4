"""When requests arrive: the arrival processes that every workload here shares, as flat parameters of the
workload."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from random import Random
from typing import ClassVar

from headway import Arrival, Request, SamplingParams, WorkloadError, param

from .content import only_its_length
from .mix import Mix

PROCESSES = ("all_at_once", "uniform", "poisson", "gamma", "closed")


def arrival_times(arrival: str, rate: float, burstiness: float, rng: Random) -> Iterator[float]:
    """Seconds at which requests arrive, without end.

    uniform: i / rate. poisson: exponential gaps. gamma: gaps of shape `burstiness` and mean 1 / rate, as in
    `vllm bench serve`: 1 is Poisson, less is burstier (coefficient of variation burstiness ** -0.5). Raises
    WorkloadError for what is no time.
    """
    given = {"rate": rate} if arrival != "gamma" else {"rate": rate, "burstiness": burstiness}
    for name, value in given.items():
        if not LEAST <= value <= MOST:
            raise WorkloadError(f"workload.{name}={value}: expected {LEAST:g} to {MOST:g}")
    for time in _times(arrival, rate, burstiness, rng):
        yield finite(time, **given)


LEAST, MOST = 1e-9, 1e9  # of a rate and of a burstiness; beyond them times stand still or are infinite


def _times(arrival: str, rate: float, burstiness: float, rng: Random) -> Iterator[float]:
    if arrival == "uniform":
        yield from (i / rate for i in count())
    now = 0.0
    while True:
        now += (
            rng.expovariate(rate)
            if arrival == "poisson"
            else rng.gammavariate(burstiness, 1 / (rate * burstiness))
        )
        yield now


def finite(time: float, **given: float) -> float:
    """`time`, which follows from the parameters `given`. Raises WorkloadError that names them where it is not
    finite."""
    if not math.isfinite(time):
        named = ", ".join(f"workload.{name}={value}" for name, value in given.items())
        raise WorkloadError(f"{named}: a request would arrive at {time} seconds; expected finite times")
    return time


LONGEST = 10_000_000  # tokens; more than any model's context


def length_range(name: str, value: int | list[int]) -> tuple[int, int]:
    """A length, or [low, high] with both ends, as (low, high). Raises WorkloadError for a list that is no
    range."""
    ends = (value, value) if isinstance(value, int) else tuple(value)
    if len(ends) != 2 or ends[0] > ends[1]:
        raise WorkloadError(f"workload.{name}={value}: expected a length, or [low, high] with low <= high")
    return ends


def random_tokens(rng: Random, length: int, vocab_size: int) -> list[int]:
    return rng.choices(range(vocab_size), k=length)


def random_prompt(rng: Random, length: int, vocab_size: int, max_model_len: int) -> Sequence[int]:
    """Tokens at random; of a prompt that does not fit the context, only its length."""
    return random_tokens(rng, length, vocab_size) if length < max_model_len else only_its_length(length)


@dataclass
class TimedWorkload(Mix):
    """Base of the workloads whose requests come one by one, in an order that does not depend on when they
    come.

    A subclass gives `requests`; times are filled in here. What is asked and when draw from separate streams
    of the seed, so that the same requests come at every rate.
    """

    arrival: str = param(
        "all_at_once",
        choices=PROCESSES,
        doc="closed: `concurrency` clients that wait for each answer",
    )
    rate: float = param(1.0, min=1e-6, max=1e9, unit="requests a second", doc="uniform, poisson and gamma")
    burstiness: float = param(
        1.0,
        min=1e-3,
        max=1e6,
        doc="shape of gamma, as in `vllm bench serve`: below 1 is burstier than Poisson",
    )
    concurrency: int = param(16, min=1, max=1_000_000, unit="requests", doc="in the system; closed")
    temperature: float = param(0.0, min=0, max=1e6)
    max_tokens: int | None = param(
        None,
        min=1,
        max=2**31 - 1,
        unit="tokens",
        doc="declared cap, which does not reveal the true length; None: up to the context",
    )

    # requests made before the run begins, so that making them costs the run no time
    lookahead: ClassVar[int] = 4096

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        """The requests in order. Their times count only for a process that replays recorded ones."""
        raise NotImplementedError

    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)

    def arrivals(self, seed: int, vocab_size: int, max_model_len: int) -> Iterable[Arrival]:
        """In order of time. Raises WorkloadError for an empty workload."""
        made = self.mixed(self.requests(seed, vocab_size, max_model_len), seed)
        head = list(islice(made, self.lookahead))
        if not head:
            raise WorkloadError(
                f"workload {self.plugin_name or type(self).__name__} is empty: it has no request to run"
            )
        self._rest = chain(head, made)  # what a closed loop still has to ask
        if self.arrival == "closed":
            return [replace(request, time=0.0) for request in islice(self._rest, self.concurrency)]
        return self._timed(seed)

    def _timed(self, seed: int) -> Iterator[Arrival]:
        if self.arrival == "all_at_once":
            return (replace(request, time=0.0) for request in self._rest)
        if self.arrival == "replay":
            return iter(self._rest)
        times = arrival_times(self.arrival, self.rate, self.burstiness, Random(f"{seed}/arrivals"))
        return (replace(request, time=time) for request, time in zip(self._rest, times, strict=False))

    def on_result(self, request: Request, now: float) -> Iterable[Arrival]:
        if self.arrival != "closed":
            return ()
        return [replace(following, time=now) for following in islice(self._rest, 1)]
