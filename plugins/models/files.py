"""Small text files of a checkpoint, read with a bound: a pipe, a device or a file of gigabytes is an error
and not a wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headway import ModelError

LARGEST = 64 << 20  # bytes of a config or a template


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Raises ModelError for what is no regular file of UTF-8 text, or larger than `largest` bytes."""
    try:
        if not path.is_file():
            raise ModelError(f"{path} is missing, or no regular file (a folder, a pipe or a device)")
        if (size := path.stat().st_size) > largest:
            raise ModelError(f"{path}: {size:,} bytes: expected at most {largest:,}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: no UTF-8 text: {error}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def read_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON object. Raises ModelError, with the line of what is no JSON."""
    try:
        found = json.loads(read_text(path, largest))
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
        raise ModelError(f"{path}:{error.lineno}: no valid JSON: {problem}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise ModelError(f"{path}: no JSON that can be read: {str(error).partition(';')[0]}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
