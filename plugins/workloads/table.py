"""A file of the user's own: CSV with a header, or one JSON object a line, with columns that the user
names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from headway import WorkloadError, near

from .lines import Lines, Malformed, json_object
from .numbers import count, seconds
from .trace_rows import Row, Source, cells_of, csv_table, is_moment, moment

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
NEEDED = ("time", "input", "output")
Cells = Iterator[tuple[int, list[Any]]]  # line, the named columns in their order


def check_columns(source: Source) -> None:
    """Raises WorkloadError for columns without which a table says nothing."""
    if missing := [name for name in NEEDED if not source.columns[name]]:
        words = " ".join(f"{name}=COLUMN" for name in missing)
        raise WorkloadError(f"{source.path}: format=table reads the columns that you name: give {words}")
    if source.columns["blocks"] and source.block_size is None:
        raise WorkloadError(
            f"{source.path}: blocks={source.columns['blocks']} needs block_size=TOKENS, of one block"
        )


def table(lines: Lines, source: Source) -> Iterator[Row]:
    """Rows of a table. Times are numbers in `unit`, or dates with a time of day; ids of blocks name whole
    prefixes."""
    check_columns(source)
    named = {what: column for what, column in source.columns.items() if column}
    rows = iter(lines)
    first = next(rows, None)
    if first is None:
        return
    read: Callable[..., Cells] = _of_json if first[1].lstrip().startswith("{") else csv_table
    if read is csv_table:
        _check_header(*first, [*named.values()])
    for number, values in read(chain([first], rows), *named.values()):
        yield _row(number, dict(zip(named, values, strict=True)), source)


def _row(line: int, found: dict[str, Any], source: Source) -> Row:
    names = source.columns
    length = count(line, names["input"], found["input"])
    ids = None
    if "blocks" in found:
        ids = _ids(line, names["blocks"], found["blocks"], length, size=source.block_size or 1)
    return Row(
        time=_time(line, names["time"], found["time"], source.unit),
        input_len=length,
        output_len=count(line, names["output"], found["output"]),
        block_ids=ids,
        block_size=source.block_size or 0 if ids is not None else 0,
        client=str(found.get("client", "")),
        session=str(found.get("session", "")),
    )


def _time(line: int, name: str, value: Any, unit: str) -> float:
    if isinstance(value, str) and is_moment(value):
        return moment(line, name, value)[0]
    return seconds(line, name, value, UNITS[unit])


def _ids(line: int, name: str, given: Any, length: int, size: int) -> list[Any]:
    """Ids of whole blocks, with the partial one behind them or without it. In CSV a JSON list, or ids with
    blanks or ; between."""
    ids = given
    if isinstance(given, str):
        ids = given.replace(";", " ").split() if not given.startswith("[") else _json_list(line, name, given)
    if not isinstance(ids, list) or not all(type(id) in (int, str) for id in ids):
        raise Malformed(line, f"{name} {str(given)[:60]}: expected a list of ids")
    if not length // size <= len(ids) <= -(-length // size):
        whole, all_of_them = length // size, -(-length // size)
        expected = f"{whole}" if whole == all_of_them else f"{whole}, or {all_of_them} with the partial one"
        raise Malformed(
            line, f"{len(ids)} {name} of {size} tokens contradict {length} input tokens: expected {expected}"
        )
    return ids


def _json_list(line: int, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Malformed(line, f"{name} {text[:60]}: no JSON list") from None


def _check_header(line: int, text: str, columns: list[str]) -> None:
    cells = cells_of(line, text)
    for column in columns:
        if column not in cells:
            raise Malformed(line, f"there is no column {column!r}.{near(column, cells)}")


def _of_json(lines: Lines, *columns: str) -> Cells:
    """`usage.prompt_tokens` is the key prompt_tokens of the object usage, where the line has no key of that
    whole name."""
    for number, text in lines:
        entry = json_object(number, text)
        yield number, [_value(number, entry, column) for column in columns]


def _value(line: int, entry: dict[str, Any], column: str) -> Any:
    if column in entry:
        return entry[column]
    found: Any = entry
    for key in column.split("."):
        if not isinstance(found, dict) or key not in found:
            raise Malformed(line, f"there is no key {column!r}.{near(column, map(str, entry))}")
        found = found[key]
    return found
