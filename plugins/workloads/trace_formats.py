"""The public trace formats, a function each: lines of a file to rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from .lines import Lines, Malformed, json_object
from .numbers import count, seconds

MOONCAKE_BLOCK = 512  # tokens a hash id stands for
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length", "hash_ids")


class Row(NamedTuple):
    """One request of a trace. Lengths in tokens; `block_ids` name blocks of `block_size` tokens, equal id
    equal whole prefix."""

    time: float  # seconds, from any origin
    input_len: int
    output_len: int
    block_ids: Sequence[int] | None = None
    block_size: int = 0


def azure(lines: Lines) -> Iterator[Row]:
    """Azure LLM inference trace: TIMESTAMP, ContextTokens, GeneratedTokens. No identity of prompts, so no
    reuse.

    Times are those of 2023 (no zone) or of 2024 (a zone each); a file has one kind or the other.
    """
    zoned: bool | None = None
    for number, (when, context, generated) in _table(lines, "TIMESTAMP", "ContextTokens", "GeneratedTokens"):
        time, zone = _moment(number, when)
        zoned = zone if zoned is None else zoned
        if zone != zoned:
            has = "a" if zone else "no"
            raise Malformed(number, f"TIMESTAMP {when!r} has {has} time zone, unlike the lines before it")
        yield Row(time, count(number, "ContextTokens", context), count(number, "GeneratedTokens", generated))


def burstgpt(lines: Lines) -> Iterator[Row]:
    """BurstGPT: Timestamp (seconds), Request tokens, Response tokens, among other columns. No identity of
    prompts.

    A request that failed there has 0 response tokens; the engine rejects it.
    """
    for number, (time, request, response) in _table(lines, "Timestamp", "Request tokens", "Response tokens"):
        lengths = count(number, "Request tokens", request), count(number, "Response tokens", response)
        yield Row(seconds(number, "Timestamp", time), *lengths)


def mooncake(lines: Lines) -> Iterator[Row]:
    """Mooncake JSONL: timestamp (ms), input_length, output_length, hash_ids of 512-token prefix blocks, the
    last one partial."""
    for number, text in lines:
        entry = json_object(number, text)
        if missing := [key for key in MOONCAKE_KEYS if key not in entry]:
            lacks = ", ".join(map(repr, missing))
            raise Malformed(number, f"lacks {lacks}: expected {', '.join(MOONCAKE_KEYS)}")
        length, ids = count(number, "input_length", entry["input_length"]), entry["hash_ids"]
        if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids):
            raise Malformed(number, f"hash_ids {str(ids)[:60]}: expected a list of whole numbers from 0")
        if len(ids) != (needed := -(-length // MOONCAKE_BLOCK)):
            problem = "do not cover" if len(ids) < needed else "are too many for"
            these = f"{len(ids)} hash_ids of {MOONCAKE_BLOCK} tokens"
            raise Malformed(number, f"{these} {problem} input_length {length}: expected {needed}")
        time = seconds(number, "timestamp", entry["timestamp"], 1000)
        yield Row(time, length, count(number, "output_length", entry["output_length"]), ids, MOONCAKE_BLOCK)


FORMATS: dict[str, Callable[[Lines], Iterator[Row]]] = {
    "azure": azure,
    "burstgpt": burstgpt,
    "mooncake": mooncake,
}


def _table(lines: Lines, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """The named columns of a CSV file with one header line, found by name."""
    at: list[int] = []
    width = 0
    for number, text in lines:
        try:
            cells = [cell.strip() for cell in next(csv.reader([text], strict=True, skipinitialspace=True))]
        except csv.Error as error:
            raise Malformed(number, f"no line of a CSV file ({error})") from None
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


def _moment(line: int, text: str) -> tuple[float, bool]:
    """Seconds from some origin, and whether the text names its time zone; without one it is taken as UTC."""
    found = _TIMESTAMP.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        whole = datetime.fromisoformat(found[1] + (found[3] or "+00:00"))
    except ValueError:
        expected = "expected a date and time like 2023-11-16 18:15:46.6805900, with a zone (Z) or none"
        raise Malformed(line, f"TIMESTAMP {text[:60]!r}: {expected}") from None
    return (whole - _ORIGIN).total_seconds() + float(found[2] or 0), found[3] is not None
