"""The public trace formats, a function each: lines of a file to rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

MOONCAKE_BLOCK = 512  # tokens a hash id stands for


class Row(NamedTuple):
    """One request of a trace. Lengths in tokens; `block_ids` name blocks of `block_size` tokens, equal id equal whole prefix."""

    time: float  # seconds, from any origin
    input_len: int
    output_len: int
    block_ids: list[int] | None = None
    block_size: int = 0


Lines = Iterable[tuple[int, str]]  # (line number, text without its end)


class Malformed(ValueError):
    """A line that is not what its format says. The reader adds file and line number."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def azure(lines: Lines) -> Iterator[Row]:
    """Azure LLM inference trace: TIMESTAMP, ContextTokens, GeneratedTokens. No identity of prompts, so no reuse."""
    for number, cells in _table(lines, "TIMESTAMP", "ContextTokens", "GeneratedTokens"):
        when, _, fraction = cells[0].removesuffix("+00:00").partition(".")
        try:
            time = (datetime.fromisoformat(when) - datetime(2000, 1, 1)).total_seconds() + (float(f"0.{fraction}") if fraction else 0.0)
        except ValueError:
            raise Malformed(number, f"TIMESTAMP {cells[0]!r}: expected a date and time like 2023-11-16 18:15:46.6805900") from None
        yield Row(time, _count(number, "ContextTokens", cells[1]), _count(number, "GeneratedTokens", cells[2]))


def burstgpt(lines: Lines) -> Iterator[Row]:
    """BurstGPT: Timestamp (seconds), Request tokens, Response tokens, among other columns. No identity of prompts."""
    for number, cells in _table(lines, "Timestamp", "Request tokens", "Response tokens"):
        time = _seconds(number, "Timestamp", cells[0])
        yield Row(time, _count(number, "Request tokens", cells[1]), _count(number, "Response tokens", cells[2]))


def mooncake(lines: Lines) -> Iterator[Row]:
    """Mooncake JSONL: timestamp (ms), input_length, output_length, hash_ids of 512-token prefix blocks, the last one partial."""
    for number, text in lines:
        try:
            entry: dict[str, Any] = json.loads(text)
            time, length, output, ids = entry["timestamp"], entry["input_length"], entry["output_length"], entry["hash_ids"]
        except json.JSONDecodeError as error:
            raise Malformed(number, f"no JSON ({error.msg} at column {error.colno})") from None
        except (KeyError, TypeError) as error:
            raise Malformed(number, f"lacks {error}: expected an object with timestamp, input_length, output_length and hash_ids") from None
        if not isinstance(ids, list) or not all(isinstance(id, int) and id >= 0 for id in ids):
            raise Malformed(number, f"hash_ids {str(ids)[:60]}: expected a list of numbers from 0")
        row = Row(_seconds(number, "timestamp", time) / 1000, _count(number, "input_length", length), _count(number, "output_length", output), ids)
        if len(ids) * MOONCAKE_BLOCK < row.input_len:
            raise Malformed(number, f"{len(ids)} hash_ids of {MOONCAKE_BLOCK} tokens do not cover input_length {row.input_len}")
        yield row._replace(block_size=MOONCAKE_BLOCK)


FORMATS: dict[str, Callable[[Lines], Iterator[Row]]] = {"azure": azure, "burstgpt": burstgpt, "mooncake": mooncake}


def _table(lines: Lines, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """The named columns of a CSV file with one header line, found by name."""
    at: list[int] = []
    width = 0
    for number, text in lines:
        cells = next(csv.reader([text]))
        if not at:
            names = [cell.strip().lstrip("\ufeff") for cell in cells]
            missing = [column for column in columns if column not in names]
            if missing:
                raise Malformed(number, f"the header lacks {', '.join(missing)}: it has {', '.join(names)}")
            at, width = [names.index(column) for column in columns], len(cells)
            continue
        if len(cells) != width:
            raise Malformed(number, f"{len(cells)} cells, the header has {width}")
        yield number, [cells[i].strip() for i in at]


def _count(line: int, name: str, value: Any) -> int:
    """A number of tokens, at least 0. (Zero is the engine's to refuse: that request alone is rejected.)"""
    try:
        count = int(value)
    except (TypeError, ValueError):
        raise Malformed(line, f"{name} {value!r}: expected a number of tokens") from None
    if count < 0 or count != float(value):
        raise Malformed(line, f"{name} {value}: expected a whole number of tokens, at least 0")
    return count


def _seconds(line: int, name: str, value: Any) -> float:
    try:
        time = float(value)
    except (TypeError, ValueError):
        raise Malformed(line, f"{name} {value!r}: expected a number") from None
    if not -1e18 < time < 1e18:  # neither infinite nor NaN
        raise Malformed(line, f"{name} {value}: expected a finite number")
    return time
