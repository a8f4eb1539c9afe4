"""Text files of a checkpoint beside those that describe its weights, read with the same bounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from headway import ModelError, checkpoint


def is_there(path: Path) -> bool:
    """Also for a link to nothing, which reading then reports: half a download is no checkpoint without that
    file."""
    return os.path.lexists(path)


def read_text(path: Path, largest: int = checkpoint.JSON_LIMIT) -> str:
    """Raises ModelError for what is no regular file of UTF-8 text, or larger than `largest` bytes."""
    try:
        checkpoint.check_regular(path)
        if (size := path.stat().st_size) > largest:
            raise ModelError(f"{path} has {size} bytes: expected at most {largest}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError."""
    try:
        return checkpoint.read_json(path)
    except RecursionError:
        raise ModelError(f"{path} cannot be read: it is nested too deeply for a config") from None
