"""What the readers of trace files share: a request as a row, what a file is read with, and block ids that fit
their length."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from .lines import Lines, Malformed


class Row(NamedTuple):
    """One request of a trace. Lengths in tokens; `block_ids` name blocks of `block_size` tokens, equal id
    equal whole prefix."""

    time: float  # seconds, from any origin
    input_len: int
    output_len: int
    block_ids: Sequence[Any] | None = None
    block_size: int = 0
    client: str = ""
    session: str = ""
    id: str = ""
    parent: str = ""  # id of the request whose answer it waits for
    category: str = ""


@dataclass(frozen=True)
class Source:
    """A file and what its format is read with, as the parameters of `Trace` give it."""

    path: str
    columns: dict[str, str]  # of a table: what it is -> the column's name; "" where there is none
    unit: str = "s"
    block_size: int | None = None
    lengths: str = ""
    start: float = 0.0
    duration: float = 3600.0
    characters_per_token: float = 4.0
    seed: int = 0


def block_ids(line: int, name: str, given: Any, length: int, size: int) -> list[int]:
    """Ids of a prompt's blocks, the last one partial. Raises Malformed where they are no ids or do not fit
    the length."""
    if not isinstance(given, list) or not all(type(id) is int and id >= 0 for id in given):
        raise Malformed(line, f"{name} {str(given)[:60]}: expected a list of whole numbers from 0")
    if len(given) != (needed := -(-length // size)):
        problem = "do not cover" if len(given) < needed else "are too many for"
        raise Malformed(
            line, f"{len(given)} {name} of {size} tokens {problem} input_length {length}: expected {needed}"
        )
    return given


def required(line: int, entry: dict[str, Any], keys: Sequence[str]) -> None:
    """Raises Malformed that names the keys which the line lacks."""
    if missing := [key for key in keys if key not in entry]:
        raise Malformed(line, f"lacks {', '.join(map(repr, missing))}: expected {', '.join(keys)}")


def cells_of(number: int, text: str) -> list[str]:
    """One line of a CSV file."""
    try:
        return [cell.strip() for cell in next(csv.reader([text], strict=True, skipinitialspace=True))]
    except csv.Error as error:
        raise Malformed(number, f"no line of a CSV file ({error})") from None


def csv_table(lines: Lines, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """The named columns of a CSV file with one header line, found by name."""
    at: list[int] = []
    width = 0
    for number, text in lines:
        cells = cells_of(number, text)
        if not at:
            if missing := [column for column in columns if column not in cells]:
                lacks, has = ", ".join(missing), ", ".join(cells)[:200]
                raise Malformed(number, f"the header lacks {lacks}: it has {has}")
            if twice := [column for column in columns if cells.count(column) > 1]:
                raise Malformed(number, f"the header has {', '.join(twice)} more than once")
            at, width = [cells.index(column) for column in columns], len(cells)
            continue
        if len(cells) != width:
            raise Malformed(number, f"{len(cells)} cells, the header has {width}")
        yield number, [cells[i] for i in at]


_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d{1,12})?\s?(Z|[+-]\d\d:?\d\d)?", re.ASCII)
_ORIGIN = datetime(2000, 1, 1, tzinfo=UTC)


def is_moment(text: str) -> bool:
    """Whether this is a date and a time of day."""
    return _TIMESTAMP.fullmatch(text) is not None


def moment(line: int, name: str, text: str) -> tuple[float, bool]:
    """Seconds from some origin, and whether the text names its time zone; without one it is taken as UTC."""
    found = _TIMESTAMP.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        whole = datetime.fromisoformat(found[1] + (found[3] or "+00:00"))
    except ValueError:
        expected = "expected a date and time like 2023-11-16 18:15:46.6805900, with a zone (Z) or none"
        raise Malformed(line, f"{name} {text[:60]!r}: {expected}") from None
    return (whole - _ORIGIN).total_seconds() + float(found[2] or 0), found[3] is not None
