"""nano-vLLM's own benchmark, request for request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from headway import Arrival, Registry, SamplingParams, hookimpl, param

from .mix import Mix


@dataclass
class NanoBench(Mix):
    """nano-vLLM's benchmark: 256 requests at once, lengths uniform 100-1024, its own seed 0, temperature 0.6,
    ignore_eos.

    142,827 prompt and 133,966 output tokens. As there, the lengths are declared as max_tokens. Token ids are
    below 10,001; a smaller vocabulary takes them modulo its size.
    """

    num_requests: int = param(256, min=1, max=16384, doc="all of them are made before the first runs")
    repeat: int = param(
        0,
        min=0,
        max=2**31 - 1,
        doc="shifts every token by 17 * repeat modulo 10,000, so that no prefix cache helps a second round",
    )

    def arrivals(self, seed: int, vocab_size: int, max_model_len: int) -> Iterable[Arrival]:
        prompts, lengths = requests(self.repeat, self.num_requests)
        made = [
            Arrival(
                0.0,
                [token % vocab_size for token in prompt],
                SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length),
            )
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        return list(self.mixed(made, seed))


def requests(repeat: int = 0, count: int = 256) -> tuple[list[list[int]], list[int]]:
    """The benchmark's prompts and answer lengths, by its own seed. Each repeat shifts the tokens, so that no
    prefix cache helps."""
    rng = Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(count)]
    lengths = [rng.randint(100, 1024) for _ in range(count)]
    if repeat:
        prompts = [[(token + 17 * repeat) % 10000 for token in prompt] for prompt in prompts]
    return prompts, lengths


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "nano_bench", NanoBench)
