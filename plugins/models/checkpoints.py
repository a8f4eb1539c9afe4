"""From a model's name to a directory in Hugging Face format: built-in ones are written into the cache, others found or downloaded."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from headway import ModelError, near


def cache_dir() -> Path:
    """$HEADWAY_CACHE, or `headway` in the platform's cache directory."""
    if own := os.environ.get("HEADWAY_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "headway"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "headway"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headway"


def find_checkpoint(name: str) -> Path:
    """The directory of `name`: tiny, tiny_llama, smollm2, a path, or a hub id. Raises ModelError that says what was tried."""
    from . import smollm2, tiny

    builtin: dict[str, Callable[[Path], None]] = {"tiny": tiny.write_qwen3, "tiny_llama": tiny.write_llama, "smollm2": smollm2.convert}
    if name in builtin:
        return cached(f"{name}-v1", builtin[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model {name!r} is a file: expected a checkpoint directory with config.json and *.safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"model {name!r}: no such directory, and no hub id (owner/name).{near(name, builtin)}")
    return _download(name)


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """cache_dir()/key, written at first use. A reader never sees half of it: it is written beside and renamed."""
    final = cache_dir() / key
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=final.parent))
    except OSError as error:
        raise ModelError(f"cannot write the model cache {final.parent}: {error}. Set HEADWAY_CACHE to a writable directory") from None
    try:
        write(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was first, and wrote the same
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return final


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(f"model {name!r} is a hub id: pip install huggingface_hub, or give the path of a checkpoint") from None
    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"model {name!r} is no directory here, and cannot be downloaded from the hub ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Offline: give the path of a checkpoint, model=tiny, or model.load_format=dummy with a shape"
        ) from error
