"""`python -m headway trace`: a trace file, measured in one pass and without making a token."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..compose.hooks import Plugin, load_registry
from ..errors import ConfigError, HeadwayError, near
from ..measure import results
from ..measure.traces import Measured, Row, told

#: Parameters of the workload that say how a file is read; the others say how it is replayed.
READING = (
    "format", "limit", "time", "unit", "input", "output", "blocks", "block_size", "client", "session",
    "lengths", "start", "duration", "characters_per_token",
)  # fmt: skip
USAGE = """\
FILE is read in the format that its first line says, or in format=NAME. A table of your own, CSV with a header
or JSON lines:
  python -m headway trace FILE time=COLUMN input=COLUMN output=COLUMN [unit=s|ms|us|ns]
                               [blocks=COLUMN block_size=TOKENS] [client=COLUMN] [session=COLUMN]
"""


class Readable(Protocol):
    """What this verb asks of the workload `trace`."""

    def read(self) -> Iterator[Row]:
        """The rows of the file, in its own order."""

    def format_found(self) -> str:
        """The format of the file."""

    @property
    def timed(self) -> bool: ...  # whether the file says when its requests came


def trace(argv: list[str]) -> int:
    about = "Requests, lengths, arrivals and prefix reuse of a trace file."
    kept = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m headway trace", None, about, USAGE, formatter_class=kept)
    parser.add_argument("path", metavar="FILE")
    parser.add_argument(
        "words", nargs="*", metavar="parameter=VALUE", help=f"how it is read: {', '.join(READING)}"
    )
    parser.add_argument("--format", help="as format=NAME")
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--out", type=Path, help="also write JSON lines: time, input_len, output_len")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    options = parser.parse_intermixed_args(argv)
    plugin = load_registry().get("workload", "trace")
    given = {name: value for name in ("format", "limit") if (value := getattr(options, name)) is not None}
    given |= _parameters(plugin, options.words)
    workload: Readable = plugin.build(path=options.path, **given)
    measured = Measured.of(workload.read(), workload.timed)
    if not measured.times:
        raise HeadwayError(f"{options.path}: holds no request")
    format, summary = workload.format_found(), measured.summary()
    if options.json:
        print(json.dumps({"format": format} | summary, indent=2))
    else:
        guessed = "" if "format" in given else ", guessed"
        print(f"format         {format}{guessed}\n{told(summary)}")
    if options.out:
        _write(measured, options.out, Path(options.path))
    return 0


def _parameters(plugin: Plugin, words: Sequence[str]) -> dict[str, Any]:
    """name=VALUE as the parameters' types have them. Raises ConfigError for a word that is none."""
    kinds: dict[str, type] = {f.name: _kind(str(f.type)) for f in plugin.parameters()}
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in READING:
            raise ConfigError(f"{word}: expected parameter=VALUE.{near(name, READING)}")
        try:
            found[name] = kinds[name](value)
        except ValueError:
            raise ConfigError(f"{word}: expected a {'whole ' if kinds[name] is int else ''}number") from None
    return found


def _kind(annotation: str) -> type:
    return next((kind for kind in (int, float) if annotation.startswith(kind.__name__)), str)


def _write(measured: Measured, out: Path, source: Path) -> None:
    """Whole or not at all, and never over the trace itself."""
    if out.exists() and source.expanduser().exists() and out.samefile(source.expanduser()):
        raise HeadwayError(f"--out {out}: is the trace itself; name another file")
    try:
        with results.whole(out) as scratch, scratch.open("w", encoding="utf-8") as file:
            for time, input_len, output_len in measured.in_order_of_time():
                row = {"time": time, "input_len": input_len, "output_len": output_len}
                file.write(json.dumps(row) + "\n")
    except results.Unwritable as error:
        raise HeadwayError(f"--out {error}") from error
