"""Recorded workloads: the public traces, replayed in their own time, at another speed, or with another
arrival process."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from headway import Arrival, Registry, Tags, WorkloadError, hookimpl, param

from .content import Content, Numbering, only_its_length
from .lines import parsed, regular_file
from .pace import LONGEST, PROCESSES, TimedWorkload
from .trace_formats import FORMATS, Row

LONGEST_ROW = 4 << 20  # bytes; the block ids of a million tokens are 20 thousand


@dataclass
class Trace(TimedWorkload):
    """A trace file (`path`, gzip or not) in one of the public formats: azure, mooncake, burstgpt.

    Block ids become tokens, so that shared prefixes are real; where a format has none, every prompt is unlike
    all others. Requests that do not fit the context are left for the engine to reject, unless `max_input_len`
    cuts them.
    """

    arrival: str = param(
        "replay",
        choices=("replay", *PROCESSES),
        doc="replay the trace's own times, or another process with its lengths",
    )
    path: str = ""
    format: str = param("mooncake", choices=tuple(FORMATS))
    time_scale: float = param(1.0, min=1e-9, max=1e6, doc="times are multiplied by it: 0.5 doubles the load")
    limit: int | None = param(None, min=1, max=2**31 - 1, doc="first so many requests")
    max_input_len: int | None = param(
        None,
        min=1,
        max=LONGEST,
        unit="tokens",
        doc="longer prompts lose their tail; None: they stay as they are",
    )
    max_output_len: int | None = param(
        None,
        min=1,
        max=LONGEST,
        unit="tokens",
        doc="longer answers end there; None: they stay as they are",
    )

    lookahead: ClassVar[int] = 32  # prompts are long and cheap to make

    def check(self) -> None:
        regular_file(self.path, self._expected)

    @property
    def _expected(self) -> str:
        return f"a file in the format {self.format}"

    def read(self) -> Iterator[Row]:
        """The rows in the file's order. Raises WorkloadError with file and line for what cannot be read."""
        rows = parsed(self.path, self._expected, FORMATS[self.format], LONGEST_ROW)
        yield from islice(rows, self.limit)

    def rows(self) -> list[Row]:
        """The whole file in order of time, block ids as numbers from 0."""
        number = Numbering()

        def numbered(row: Row) -> Row:
            ids = row.block_ids
            return row if ids is None else row._replace(block_ids=array("q", map(number, ids)))

        rows = [numbered(row) for row in self.read()]
        if not rows:
            raise WorkloadError(f"{self.path}: holds no request")
        return sorted(rows, key=lambda row: row.time)

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        rows, content, sampling = self.rows(), Content(seed, vocab_size), self.sampling()
        origin = rows[0].time
        for i, row in enumerate(rows):
            length = min(row.input_len, self.max_input_len or row.input_len)
            output = min(row.output_len, self.max_output_len or row.output_len)
            prompt = _prompt(row, i, length, content) if length < max_model_len else only_its_length(length)
            time = (row.time - origin) * self.time_scale
            yield Arrival(time, prompt, sampling, output, tags=Tags(category=self.format))


def _prompt(row: Row, serial: int, length: int, content: Content) -> Sequence[int]:
    """Tokens of the row's blocks, or, where it names none, of a sequence that no other row has."""
    if row.block_ids is None:
        return content.tokens(serial, length)
    prompt: list[int] = []
    for id in row.block_ids[: -(-length // row.block_size)]:
        prompt += content.tokens(id, row.block_size)
    del prompt[length:]
    return prompt


@dataclass
class Azure(Trace):
    """Azure's LLM inference trace (Patel et al., Splitwise, ISCA'24): arrival times and lengths, no shared
    prefixes."""

    format: str = param("azure", choices=tuple(FORMATS))


@dataclass
class Mooncake(Trace):
    """Mooncake's traces (Qin et al., FAST'25): arrival times, lengths, and prefixes shared in blocks of 512
    tokens."""

    format: str = param("mooncake", choices=tuple(FORMATS))


@dataclass
class BurstGPT(Trace):
    """BurstGPT (Wang et al., 2024): arrival times and lengths of ChatGPT and GPT-4 use, no shared
    prefixes."""

    format: str = param("burstgpt", choices=tuple(FORMATS))


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "trace", Trace)
    registry.add("workload", "azure", Azure)
    registry.add("workload", "mooncake", Mooncake)
    registry.add("workload", "burstgpt", BurstGPT)
