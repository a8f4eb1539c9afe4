"""Recorded workloads: traces replayed in their own time, at another speed, or with another arrival
process."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from headway import Arrival, Registry, Request, Run, Tags, WorkloadError, hookimpl, param

from .content import Content, Numbering, Prompt, only_its_length
from .known_formats import FORMATS, LONGEST_GROUP, guessed
from .lines import Lines, parsed, regular_file
from .pace import LONGEST, PROCESSES, TimedWorkload
from .table import UNITS, check_columns
from .trace_rows import Row, Source

LONGEST_ROW = 4 << 20  # bytes; the block ids of a million tokens are 20 thousand
COLUMN = "the name of a table's column (format=table); "


@dataclass
class Trace(TimedWorkload):
    """A trace file (`path`, gzip or not) in one of the public formats, or a table with columns that you name.

    Block ids become tokens, so that shared prefixes are real; where a format has none, every prompt is unlike
    all others. Where it knows turns, a turn comes as long after the one before it as recorded, and not before
    that one's answer. Requests that do not fit the context are left for the engine to reject, unless
    `max_input_len` cuts them.
    """

    arrival: str = param(
        "replay",
        choices=("replay", *PROCESSES),
        doc="replay the trace's own times, or another process with its lengths",
    )
    path: str = ""
    format: str = param("auto", choices=("auto", *FORMATS), doc="auto: what its first line says")
    follow: str = param(
        "answers",
        choices=("answers", "times"),
        doc="what a turn follows: the answer before it, or its own time, answered or not",
    )
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
    time: str = param("", doc=COLUMN + "when a request came")
    unit: str = param(
        "s", choices=tuple(UNITS), doc="of that column's numbers; dates with a time of day are read too"
    )
    input: str = param("", doc=COLUMN + "tokens of the prompt")
    output: str = param("", doc=COLUMN + "tokens of the answer")
    blocks: str = param("", doc=COLUMN + "ids of the prompt's blocks: equal id, equal whole prefix")
    block_size: int | None = param(None, min=1, max=2**20, unit="tokens", doc="of the blocks of a table")
    client: str = param("", doc=COLUMN + "who asks")
    session: str = param("", doc=COLUMN + "the conversation")
    lengths: str = param("", doc="ServeGen's file of lengths")
    start: float = param(
        0.0, min=0, max=1e9, unit="seconds", doc="from which requests are drawn of ServeGen's mix"
    )
    duration: float = param(3600.0, above=0, max=1e9, unit="seconds", doc="for which they are drawn")
    characters_per_token: float = param(4.0, min=0.1, max=100, doc="of ShareGPT's texts")

    lookahead: ClassVar[int] = 32  # prompts are long and cheap to make

    def check(self) -> None:
        regular_file(self.path, self._expected)
        format = self.format_found()
        if format == "table":
            check_columns(self._source(0))
        if format == "agents":
            raise WorkloadError(f"{self.path}: agent sessions are a closed loop: use workload=agents")
        if self.arrival == "replay" and not FORMATS[format].timed:
            raise WorkloadError(
                f"{self.path}: {format} has no times: set workload.arrival (poisson, ...) and workload.rate"
            )

    @property
    def _expected(self) -> str:
        return "a trace file" if self.format == "auto" else f"a file in the format {self.format}"

    def format_found(self) -> str:
        """The format that is given, or that the first line says; a table where its columns are named."""
        if self.format != "auto":
            return self.format
        return "table" if self.time or self.input or self.output else guessed(self.path)

    @property
    def timed(self) -> bool:
        """Whether the file says when its requests came."""
        return FORMATS[self.format_found()].timed

    def _source(self, seed: int) -> Source:
        columns = {
            name: getattr(self, name) for name in ("time", "input", "output", "blocks", "client", "session")
        }
        about = {name: getattr(self, name) for name in ("unit", "block_size", "lengths", "start", "duration")}
        return Source(self.path, columns, characters_per_token=self.characters_per_token, seed=seed, **about)

    def read(self, seed: int = 0) -> Iterator[Row]:
        """The rows in the file's order. Raises WorkloadError with file and line for what cannot be read."""
        regular_file(self.path, self._expected)
        format = FORMATS[self.format_found()]
        longest = LONGEST_GROUP if format.groups else LONGEST_ROW
        source = self._source(seed)

        def rows(lines: Lines) -> Iterator[Row]:
            return format.read(lines, source)

        yield from islice(parsed(self.path, self._expected, rows, longest), self.limit)

    def rows(self, seed: int = 0) -> list[Row]:
        """The whole file in order of time, block ids as numbers from 0."""
        number = Numbering()

        def numbered(row: Row) -> Row:
            ids = row.block_ids
            return row if ids is None else row._replace(block_ids=array("q", map(number, ids)))

        rows = [numbered(row) for row in self.read(seed)]
        if not rows:
            raise WorkloadError(f"{self.path}: holds no request")
        self._tails = number.end  # ids from here on name what no block covers
        return sorted(rows, key=lambda row: row.time)

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        self.check()
        self._category = self.format_found()
        self._rows, self._content, self._fits = self.rows(seed), Content(seed, vocab_size), max_model_len
        before = _turns(self._rows)
        self._turn = _depths(before)
        self._end = {row.session: i for i, row in enumerate(self._rows) if row.session}  # place of its last
        self._waits_for = before if self.follow == "answers" else {}
        self._following: dict[int, list[int]] = {}
        for place, earlier in self._waits_for.items():
            self._following.setdefault(earlier, []).append(place)
        for i in range(len(self._rows)):
            if i not in self._waits_for:
                yield self._arrival(i, (self._rows[i].time - self._rows[0].time) * self.time_scale)

    def _arrival(self, i: int, time: float) -> Arrival:
        row = self._rows[i]
        length = min(row.input_len, self.max_input_len or row.input_len)
        output = min(row.output_len, self.max_output_len or row.output_len)
        prompt = self._prompt(row, i, length) if length < self._fits else only_its_length(length)
        tags = Tags(
            client=row.client,
            session=row.session,
            turn=self._turn.get(i, 0),
            category=row.category or self._category,
            parents=(f"r{self._waits_for[i]}",) if i in self._waits_for else (),
            last=self._end.get(row.session) == i,
        )
        return Arrival(time, prompt, self.sampling(), output, tags=tags, id=f"r{i}")

    def _prompt(self, row: Row, serial: int, length: int) -> Sequence[int]:
        """Tokens of the row's blocks, and behind them, or where it names none, of a sequence that no other
        row has."""
        if row.block_ids is None:
            return Prompt(self._content, (), 1, length, tail=serial)
        return Prompt(self._content, row.block_ids, row.block_size, length, tail=self._tails + serial)

    def on_result(self, request: Request, now: float) -> Iterable[Arrival]:
        i = int(request.id.removeprefix("r"))
        if i not in self._following:
            return super().on_result(request, now)
        began, scale = self._rows[i].time, self.time_scale
        due = [(j, request.arrival_time + (self._rows[j].time - began) * scale) for j in self._following[i]]
        return [self.dealt(self._arrival(j, max(now, time))) for j, time in due]


def _turns(rows: Sequence[Row]) -> dict[int, int]:
    """Place of a request -> place of the one whose answer it waits for: its parent where the trace names one,
    else the turn before it in its conversation."""
    last: dict[Hashable, int] = {}
    places: dict[str, int] = {}
    found: dict[int, int] = {}
    for i, row in enumerate(rows):
        before = places.get(row.parent) if row.id else last.get(row.session)
        if before is not None and row.session:
            found[i] = before
        places[row.id], last[row.session] = i, i
    return found


def _depths(before: dict[int, int]) -> dict[int, int]:
    """Place of a request that has one before it -> how many it has, one before the other."""
    depths: dict[int, int] = {}
    for i, earlier in sorted(before.items()):
        depths[i] = depths.get(earlier, 0) + 1
    return depths


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
def headway_run_start(run: Run) -> None:
    workload = run.roles.get("workload")
    if run.directory and isinstance(workload, Trace) and workload.format == "auto":
        print(
            f"trace: {workload.path} is in the format {workload.format_found()}, by its first line",
            flush=True,
        )


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "trace", Trace)
    registry.add("workload", "azure", Azure)
    registry.add("workload", "mooncake", Mooncake)
    registry.add("workload", "burstgpt", BurstGPT)
