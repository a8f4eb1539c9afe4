"""Recorded workloads: the public traces, replayed in their own time, at another speed, or with another arrival process."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from headway import Arrival, Tags, WorkloadError, hookimpl, param

from .content import Content
from .pace import LONGEST, PROCESSES, Paced
from .trace_formats import FORMATS, Malformed, Row


@dataclass
class Trace(Paced):
    """A trace file (`path`, gzip or not) in one of the public formats: azure, mooncake, burstgpt.

    Block ids become tokens, so that shared prefixes are real; where a format has none, every prompt is unlike all others.
    Requests that do not fit the context are left for the engine to reject, unless `max_input_len` cuts them.
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
        if not self.path:
            raise WorkloadError(f"workload.path is not set: give a file in the format {self.format} (workload.path=FILE)")
        if not Path(self.path).expanduser().is_file():
            raise WorkloadError(f"workload.path={self.path}: there is no such file")

    def rows(self) -> list[Row]:
        """The whole file, in order of time, checked. Raises WorkloadError with file and line for what cannot be read."""
        self.check()
        file = Path(self.path).expanduser()
        opened = gzip.open if file.suffix == ".gz" else open
        rows: list[Row] = []
        try:
            with opened(file, "rt", encoding="utf-8") as lines:
                numbered = ((i, line.rstrip("\r\n")) for i, line in enumerate(lines, 1) if not line.isspace())
                for row in FORMATS[self.format](numbered):
                    if self.limit is not None and len(rows) >= self.limit:
                        break
                    rows.append(row)
        except Malformed as error:
            raise WorkloadError(f"{self.path}:{error.line}: {error}") from None
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise WorkloadError(f"{self.path}: cannot be read after {len(rows)} requests ({error})") from error
        if not rows:
            raise WorkloadError(f"{self.path}: holds no request")
        return sorted(rows, key=lambda row: row.time)

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        rows, content, sampling = self.rows(), Content(seed, vocab_size), self.sampling()
        origin = rows[0].time
        for i, row in enumerate(rows):
            length = min(row.input_len, self.max_input_len or row.input_len)
            output = min(row.output_len, self.max_output_len or row.output_len)
            prompt: list[int] = []
            if row.block_ids is None:
                prompt = content.tokens(i, length)
            else:
                for id in row.block_ids[: -(-length // row.block_size)]:
                    prompt += content.tokens(id, row.block_size)
                del prompt[length:]
            yield Arrival((row.time - origin) * self.time_scale, prompt, sampling, output, tags=Tags(category=self.format))


@dataclass
class Azure(Trace):
    """Azure's LLM inference trace (Patel et al., Splitwise, ISCA'24): arrival times and lengths, no shared prefixes."""

    format: str = param("azure", choices=tuple(FORMATS))


@dataclass
class Mooncake(Trace):
    """Mooncake's traces (Qin et al., FAST'25): arrival times, lengths, and prefixes shared in blocks of 512 tokens."""

    format: str = param("mooncake", choices=tuple(FORMATS))


@dataclass
class BurstGPT(Trace):
    """BurstGPT (Wang et al., 2024): arrival times and lengths of ChatGPT and GPT-4 use, no shared prefixes."""

    format: str = param("burstgpt", choices=tuple(FORMATS))


@hookimpl
def headway_register(registry):
    registry.add("workload", "trace", Trace)
    registry.add("workload", "azure", Azure)
    registry.add("workload", "mooncake", Mooncake)
    registry.add("workload", "burstgpt", BurstGPT)
