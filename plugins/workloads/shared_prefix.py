"""Groups of requests whose prompts begin alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from random import Random

from headway import Arrival, Registry, Tags, WorkloadError, hookimpl, param

from .content import only_its_length
from .pace import LONGEST, TimedWorkload, length_range, random_tokens


@dataclass
class SharedPrefix(TimedWorkload):
    """A share of the requests falls into groups; a group shares the leading part of its prompts.

    The defaults are the classic test: 100 requests of 512 tokens, 70% of which share 80% of the prompt. With
    a cold cache the first of a group computes its prefix, so at most (70 - 1) * 410 of 51,200 prompt tokens
    can be hits.
    """

    num_requests: int = param(100, min=1, max=10_000_000)
    input_len: int | list[int] = param(512, min=1, max=LONGEST, unit="tokens")
    output_len: int | list[int] = param(32, min=1, max=LONGEST, unit="tokens")
    groups: int = param(1, min=1, max=10_000_000, doc="distinct prefixes")
    share_requests: float = param(0.7, min=0, max=1, doc="share of the requests that belong to a group")
    share_prompt: float = param(
        0.8,
        min=0,
        max=1,
        doc="share of a prompt that is its group's prefix, rounded up to a token",
    )

    def __post_init__(self) -> None:
        self._input, self._output = (
            length_range("input_len", self.input_len),
            length_range("output_len", self.output_len),
        )
        if self.groups > self.num_requests:
            most = f"at most workload.num_requests={self.num_requests}"
            raise WorkloadError(f"workload.groups={self.groups}: expected {most}")

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        rng, sampling = Random(f"{seed}/requests"), self.sampling()
        sharing = round(self.share_requests * self.num_requests)
        group_of = [i % self.groups if i < sharing else -1 for i in range(self.num_requests)]
        rng.shuffle(group_of)
        shared = min(ceil(self.share_prompt * self._input[1]), max_model_len)  # longer prompts are never made
        prefixes = [random_tokens(rng, shared, vocab_size) for _ in range(self.groups)]
        for group in group_of:
            length, output = rng.randint(*self._input), rng.randint(*self._output)
            prompt: Sequence[int] = only_its_length(length)
            if length < max_model_len:
                head = prefixes[group][: ceil(self.share_prompt * length)] if group >= 0 else []
                prompt = head + random_tokens(rng, length - len(head), vocab_size)
            yield Arrival(
                0.0, prompt, sampling, output, tags=Tags(category=f"group{group}" if group >= 0 else "alone")
            )


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "shared_prefix", SharedPrefix)
