"""Prompts of random tokens, with fixed or uniform lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from headway import Arrival, Tags, WorkloadError, hookimpl

from .pace import Paced, length_range, random_prompt


@dataclass
class RandomLengths(Paced):
    """Random tokens; input and output lengths fixed or uniform in [low, high]."""

    num_requests: int = 64
    input_len: Any = 128  # tokens: a number, or [low, high] with both ends
    output_len: Any = 32  # tokens: a number, or [low, high] with both ends
    clients: int = 1  # request i belongs to client i modulo clients
    priorities: int = 1  # priority classes, drawn uniformly; 0 is the most urgent

    def __post_init__(self) -> None:
        super().__post_init__()
        self._input, self._output = length_range("input_len", self.input_len), length_range("output_len", self.output_len)
        for name in ("num_requests", "clients", "priorities"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"workload.{name}={getattr(self, name)}: expected at least 1")

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        rng, sampling = Random(f"{seed}/requests"), self.sampling()
        for i in range(self.num_requests):
            length, output = rng.randint(*self._input), rng.randint(*self._output)
            priority = rng.randrange(self.priorities)
            prompt = random_prompt(rng, length, vocab_size, max_model_len)
            yield Arrival(0.0, prompt, sampling, output, tags=Tags(client=f"c{i % self.clients}", priority=priority))


@hookimpl
def headway_register(registry):
    registry.add("workload", "random", RandomLengths)
