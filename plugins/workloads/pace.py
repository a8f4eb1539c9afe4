"""When requests arrive: the arrival processes that every workload here shares, as flat parameters of the workload."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from random import Random
from typing import Any, ClassVar

from headway import Arrival, Request, SamplingParams, Workload, WorkloadError, near

from .content import only_its_length
from .numbers import MOST_TOKENS


def arrival_times(arrival: str, rate: float, burstiness: float, rng: Random) -> Iterator[float]:
    """Seconds at which requests arrive, without end.

    uniform: i / rate. poisson: exponential gaps. gamma: gaps of shape `burstiness` and mean 1 / rate, as in `vllm bench
    serve`: 1 is Poisson, less is burstier (coefficient of variation burstiness ** -0.5). Raises WorkloadError
    for what is no time.
    """
    given = {"rate": rate} if arrival != "gamma" else {"rate": rate, "burstiness": burstiness}
    for name, value in given.items():
        if not LEAST <= value <= 1 / LEAST:
            raise WorkloadError(f"workload.{name}={value}: expected {LEAST:g} to {1 / LEAST:g}")
    for time in _times(arrival, rate, burstiness, rng):
        yield finite(time, **given)


LEAST = 1e-9  # of a rate and of a burstiness; beyond it, or its inverse, times stand still or are infinite


def _times(arrival: str, rate: float, burstiness: float, rng: Random) -> Iterator[float]:
    if arrival == "uniform":
        yield from (i / rate for i in count())
    now = 0.0
    while True:
        now += rng.expovariate(rate) if arrival == "poisson" else rng.gammavariate(burstiness, 1 / (rate * burstiness))
        yield now


def finite(time: float, **given: float) -> float:
    """`time`, which follows from the parameters `given`. Raises WorkloadError that names them where it is not
    finite."""
    if not math.isfinite(time):
        named = ", ".join(f"workload.{name}={value}" for name, value in given.items())
        raise WorkloadError(f"{named}: a request would arrive at {time} seconds; expected finite times")
    return time


def length_range(name: str, value: Any) -> tuple[int, int]:
    """A fixed length, or [low, high] with both ends included, as (low, high). Raises WorkloadError for anything else."""
    try:
        low, high = (value, value) if isinstance(value, int) else value
    except (TypeError, ValueError):
        low, high = 0, 0
    if not (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high <= MOST_TOKENS):
        expected = f"expected a length from 1 to {MOST_TOKENS:,}, or [low, high] with 1 <= low <= high"
        raise WorkloadError(f"workload.{name}={value}: {expected}")
    return low, high


def first(items: Iterable[Any], count: int | None) -> Iterator[Any]:
    """So many of the items at most, all where `count` is None. A count may be larger than any index."""
    return islice(items, count if count is None else min(count, sys.maxsize))


def random_tokens(rng: Random, length: int, vocab_size: int) -> list[int]:
    return rng.choices(range(vocab_size), k=length)


def random_prompt(rng: Random, length: int, vocab_size: int, max_model_len: int) -> Sequence[int]:
    """Tokens at random; of a prompt that does not fit the context, only its length."""
    return random_tokens(rng, length, vocab_size) if length < max_model_len else only_its_length(length)


@dataclass
class Paced(Workload):
    """Base of the workloads whose requests come one by one, in an order that does not depend on when they come.

    A subclass gives `requests`; times are filled in here. What is asked and when draw from separate streams of the seed, so
    that the same requests come at every rate.
    """

    arrival: str = "all_at_once"  # all_at_once, uniform, poisson, gamma, or closed: `concurrency` clients that wait for each answer
    rate: float = 1.0  # requests a second; uniform, poisson and gamma
    burstiness: float = 1.0  # shape of gamma, as in `vllm bench serve`: below 1 is burstier than Poisson
    concurrency: int = 16  # requests in the system; closed
    temperature: float = 0.0
    max_tokens: int | None = None  # declared cap, which does not reveal the true length; None: up to the context

    processes: ClassVar[tuple[str, ...]] = ("all_at_once", "uniform", "poisson", "gamma", "closed")
    lookahead: ClassVar[int] = 4096  # requests made before the run begins, so that making them costs the run no time

    def __post_init__(self) -> None:
        if self.arrival not in self.processes:
            raise WorkloadError(f"workload.arrival={self.arrival!r} is not known.{near(self.arrival, self.processes)}")
        for name in ("rate", "burstiness", "concurrency"):
            if not getattr(self, name) > 0:
                raise WorkloadError(f"workload.{name}={getattr(self, name)}: expected a positive number")
        self.sampling()

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        """The requests in order. Their times count only for a process that replays recorded ones."""
        raise NotImplementedError

    def sampling(self) -> SamplingParams:
        try:
            return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)
        except ValueError as error:
            raise WorkloadError(f"workload.{error}") from None

    def arrivals(self, seed: int, vocab_size: int, max_model_len: int) -> Iterable[Arrival]:
        """In order of time. Raises WorkloadError for an empty workload."""
        made = self.requests(seed, vocab_size, max_model_len)
        head = list(islice(made, self.lookahead))
        if not head:
            raise WorkloadError(f"workload {self.plugin_name or type(self).__name__} is empty: it has no request to run")
        self._rest = chain(head, made)  # what a closed loop still has to ask
        if self.arrival == "closed":
            return [replace(request, time=0.0) for request in first(self._rest, self.concurrency)]
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
