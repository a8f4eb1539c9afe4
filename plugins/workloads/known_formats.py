"""The formats of trace files by name, and which of them a file is in, by its first line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from headway import WorkloadError

from .client_mix import COLUMNS as SERVEGEN_COLUMNS
from .client_mix import servegen
from .conversations import BAILIAN_KEYS, COMPONENTS, agents, qwen_bailian, ragpulse, sharegpt
from .lines import Lines, Malformed, json_object, parsed
from .spans import otel
from .table import table
from .trace_formats import (
    AZURE_COLUMNS,
    BURSTGPT_COLUMNS,
    MOONCAKE_KEYS,
    VLLM_BENCH_KEYS,
    azure,
    burstgpt,
    mooncake,
    vllm_bench,
)
from .trace_rows import Row, Source, cells_of

LONGEST_GROUP = 64 << 20  # bytes of a line that holds many requests


class Format(NamedTuple):
    """How a file is read."""

    read: Callable[[Lines, Source], Iterator[Row]]
    timed: bool = True  # whether it says when its requests came
    groups: bool = False  # whether a line may hold many requests


FORMATS = {
    "azure": Format(azure),
    "mooncake": Format(mooncake),
    "burstgpt": Format(burstgpt),
    "qwen_bailian": Format(qwen_bailian),
    "ragpulse": Format(ragpulse),
    "servegen": Format(servegen),
    "otel": Format(otel, groups=True),
    "vllm_bench": Format(vllm_bench, groups=True),
    "agents": Format(agents, timed=False, groups=True),
    "sharegpt": Format(sharegpt, timed=False, groups=True),
    "table": Format(table),
}
#: Keys of a line of JSON -> what it is; the first that fits is it.
_BY_KEYS = {
    "otel": {"resourceSpans"},
    "vllm_bench": set(VLLM_BENCH_KEYS),
    "agents": {"requests", "block_size"},
    "qwen_bailian": set(BAILIAN_KEYS),
    "mooncake": set(MOONCAKE_KEYS),
    "sharegpt": {"conversations"},
}
_BY_COLUMNS = {"azure": AZURE_COLUMNS, "burstgpt": BURSTGPT_COLUMNS, "servegen": SERVEGEN_COLUMNS}


def guessed(path: str) -> str:
    """The format of a file, by its first line. Raises WorkloadError where none fits."""
    for format in parsed(path, "a trace file", _guesses):
        return format
    raise WorkloadError(f"{path}: holds no request")


def _guesses(lines: Lines) -> Iterator[str]:
    for number, text in islice(lines, 1):
        yield _of_json(number, text) if text.lstrip()[:1] in "{[" else _of_columns(number, text)


def _of_json(line: int, text: str) -> str:
    if text.lstrip().startswith("["):
        return "sharegpt"
    entry = json_object(line, text)
    ids = entry.get("hash_ids")
    if isinstance(ids, dict) and ids.keys() <= COMPONENTS.keys():
        return "ragpulse"
    for format, keys in _BY_KEYS.items():
        if keys <= entry.keys():
            return format
    raise Malformed(line, _none_fits("keys", entry))


def _of_columns(line: int, text: str) -> str:
    cells = cells_of(line, text)
    for format, columns in _BY_COLUMNS.items():
        if set(columns) <= set(cells):
            return format
    raise Malformed(line, _none_fits("columns", cells))


def _none_fits(what: str, found: object) -> str:
    names = ", ".join(map(str, found))[:200]  # type: ignore[call-overload]
    own = "name a table's columns with time=COLUMN input=COLUMN output=COLUMN"
    return f"no known format has the {what} {names}: give format= ({', '.join(FORMATS)}), or {own}"
