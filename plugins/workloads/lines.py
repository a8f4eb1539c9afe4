"""Text files line by line, for every workload that reads one: no file costs more than its longest good
line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from headway import WorkloadError

LONGEST = 64 << 20  # bytes of one line; a session of a thousand calls with its block ids takes a few million
GZIP = b"\x1f\x8b"
T = TypeVar("T")
Lines = Iterable[tuple[int, str]]  # (line number, text without its end)


class Malformed(ValueError):
    """A line that is not what its format says. `parsed` adds the file."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def regular_file(path: str, expected: str) -> Path:
    """`path` as a file. Raises WorkloadError for what is missing, and for what may never end: a pipe, a
    device."""
    if not path:
        raise WorkloadError(f"workload.path is not set: give {expected} (workload.path=FILE)")
    try:
        file = Path(path).expanduser()
        if file.is_file():
            return file
        problem = "there is no such file"
        if file.exists():
            problem = "is no regular file (a folder, a pipe or a device)"
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, ~nobody, a NUL byte
        problem = f"is no path of a file ({error})"
    shown = path if path.isprintable() else repr(path)
    raise WorkloadError(f"workload.path={shown}: {problem}; expected {expected}")


def parsed(path: str, expected: str, parse: Callable[[Lines], Iterator[T]], longest: int = 0) -> Iterator[T]:
    """What `parse` makes of the lines of `path`, gzip or not; `longest` is the most bytes of one.

    Raises WorkloadError with file and line.
    """
    file = regular_file(path, expected)
    at = 0

    def counted(lines: Lines) -> Iterator[tuple[int, str]]:
        nonlocal at
        for number, text in lines:
            at = number
            yield number, text

    try:
        with _opened(file) as binary:
            yield from parse(counted(_lines(binary, longest or LONGEST)))
    except Malformed as error:
        raise WorkloadError(f"{path}:{error.line}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"{path}:{at + 1}: cannot be read on ({error})") from error


def json_object(line: int, text: str) -> dict[str, Any]:
    """One JSON object. Raises Malformed for anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed(line, f"no JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise Malformed(line, f"no JSON that can be read ({str(error).partition(';')[0]})") from None
    if r"\u" in text and (half := _half_letter(found)):
        raise Malformed(line, f"no text: {half} is one half of a letter (an unpaired surrogate)")
    if not isinstance(found, dict):
        raise Malformed(line, f"expected one JSON object a line, got {_short(found)}")
    return found


def _half_letter(found: Any) -> str:
    """The first surrogate that JSON escapes without its other half, which no tokenizer and no file takes; ""
    for none."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return ""


def _opened(file: Path) -> IO[bytes]:
    packed = file.suffix == ".gz"
    if not packed:
        with file.open("rb") as start:
            packed = start.read(len(GZIP)) == GZIP
    return gzip.open(file, "rb") if packed else file.open("rb")  # type: ignore[return-value]


def _lines(binary: IO[bytes], longest: int) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, blank ones left out. LF, CRLF or CR ends them; a byte-order mark is
    dropped."""
    number = 0
    while chunk := binary.readline(longest + 1):
        if len(chunk) > longest:
            raise Malformed(number + 1, f"the line is longer than {longest >> 20} MiB")
        for line in chunk.splitlines():
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise Malformed(number, f"no UTF-8 (byte 0x{byte:02x} at column {error.start + 1})") from None
            if "\0" in text:
                column = text.index("\0") + 1
                raise Malformed(number, f"a NUL byte at column {column}: expected text in UTF-8")
            if text and not text.isspace():
                yield number, text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
