"""Prompts of random tokens, with fixed or uniform lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from headway import Arrival, Registry, Tags, hookimpl, param

from .pace import LONGEST, TimedWorkload, length_range, random_prompt


@dataclass
class RandomLengths(TimedWorkload):
    """Random tokens; input and output lengths fixed or uniform in [low, high]."""

    num_requests: int = param(64, min=1, max=10_000_000)
    input_len: int | list[int] = param(128, min=1, max=LONGEST, unit="tokens")
    output_len: int | list[int] = param(32, min=1, max=LONGEST, unit="tokens")
    clients: int = param(1, min=1, max=1_000_000, doc="request i belongs to client i modulo clients")
    priorities: int = param(
        1,
        min=1,
        max=1_000_000,
        doc="priority classes, drawn uniformly; 0 is the most urgent",
    )

    dealt_by_itself: ClassVar[tuple[str, ...]] = ("clients", "priorities")

    def __post_init__(self) -> None:
        self._input, self._output = (
            length_range("input_len", self.input_len),
            length_range("output_len", self.output_len),
        )

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        rng, sampling = Random(f"{seed}/requests"), self.sampling()
        for i in range(self.num_requests):
            length, output = rng.randint(*self._input), rng.randint(*self._output)
            priority = rng.randrange(self.priorities)
            prompt = random_prompt(rng, length, vocab_size, max_model_len)
            yield Arrival(
                0.0, prompt, sampling, output, tags=Tags(client=f"c{i % self.clients}", priority=priority)
            )


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "random", RandomLengths)
