"""From a model's name to a directory in Hugging Face format: written into the cache, found or downloaded."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headway import ModelError, near

MANIFEST = "manifest.json"  # in a cached entry: size, time of change and SHA-256 of every other file
ALWAYS_READ = 4 << 20  # bytes up to which a cached file's digest is checked at every use
DAY = 86400.0  # seconds
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja")
NOT_DOWNLOADED = (
    "*/*",
    "consolidated*",
    "adapter_model*",
)  # other formats, other precisions: what loading does not open


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
    """The directory of `name`: tiny, tiny_llama, smollm2, a path, or a hub id.

    Raises ModelError that says what was tried.
    """
    from . import smollm2, tiny

    builtin: dict[str, Callable[[Path], None]] = {
        "tiny": tiny.write_qwen3,
        "tiny_llama": tiny.write_llama,
        "smollm2": smollm2.convert,
    }
    if name in builtin:
        return cached(f"{name}-v1", builtin[name])
    path = Path(os.path.expanduser(name))
    try:
        if name and path.is_dir():
            return path
        there = os.path.lexists(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name[:80]!r} is no path: {error}") from None
    if name and there:
        raise ModelError(f"model {name!r} is a file: expected a directory with config.json and *.safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model {name!r}: no such directory, and no hub id (owner/name).{near(name, builtin)}"
        )
    return _download(name)


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """cache_dir()/key, written at first use and again when it is no longer what was written.

    A reader never sees half of it: it is written beside and renamed, by one process at a time.

    Checked at every use: names, sizes and times of change of all files, and the digest of those up to
    `ALWAYS_READ` bytes. The digest of larger ones is checked only when their time of change is another than
    after writing, so that 500 MB of weights are not read twice at every start. Not found: damage to a large
    file that leaves size and time as they were, and changes by somebody who can write the manifest too.
    """
    final = cache_dir() / key
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(final)
        if _intact(final):
            return final
        with _alone(final.parent):
            if not _intact(final):  # otherwise another process was first
                _write(final, write)
    except OSError as error:
        text = f"cannot use the model cache {final.parent}: {error}"
        raise ModelError(f"{text}. Set HEADWAY_CACHE to a writable directory") from error
    return final


# ---- the cache -------------------------------------------------------------------------------------------


def _write(final: Path, write: Callable[[Path], None]) -> None:
    unfinished = _beside(final)
    unfinished.mkdir(mode=0o700)
    try:
        write(unfinished)
        (unfinished / MANIFEST).write_text(json.dumps(_manifest(unfinished), indent=1), encoding="utf-8")
        _open_to_readers_of(final.parent, unfinished)
        if os.path.lexists(final):
            final.rename(old := _beside(final))
            shutil.rmtree(old, ignore_errors=True)
        unfinished.rename(final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    files = {path.name: (path.stat(), digest(path)) for path in sorted(directory.iterdir())}
    return {n: {"size": s.st_size, "mtime_ns": s.st_mtime_ns, "sha256": d} for n, (s, d) in files.items()}


def _intact(entry: Path) -> bool:
    """What `cached` promises to check."""
    try:
        listed = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        if {path.name for path in entry.iterdir()} != {MANIFEST, *listed}:
            return False
        return bool(listed) and all(_unchanged(entry / name, **written) for name, written in listed.items())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False  # not there, or no manifest that we wrote


def _unchanged(path: Path, size: int, mtime_ns: int, sha256: str) -> bool:
    found = path.stat()
    if not path.is_file() or found.st_size != size:
        return False
    return (size > ALWAYS_READ and found.st_mtime_ns == mtime_ns) or digest(path) == sha256


def digest(path: Path) -> str:
    """SHA-256, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_to_readers_of(folder: Path, entry: Path) -> None:
    """Whoever may read the cache's folder may read an entry, and the owner alone writes it.

    Some writers make files that only the owner can read.
    """
    mode = folder.stat().st_mode
    for path in entry.iterdir():
        path.chmod(0o600 | mode & 0o044)
    entry.chmod(0o700 | mode & 0o055)


def _beside(final: Path) -> Path:
    """A name for an unfinished entry, which says whose it is."""
    return final.with_name(f".{final.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_left_over(final: Path) -> None:
    """Unfinished entries whose process ended before it could remove them."""
    for path in final.parent.glob(f".{final.name}-*"):
        with suppress(OSError):  # it was finished, or removed, just now
            if _abandoned(path, path.name.removeprefix(f".{final.name}-")):
                shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path, owner: str) -> bool:
    """Of a process of this host: gone. Of another host's, or where nobody can tell: untouched for a day."""
    host, _, process = owner.rpartition("-")[0].rpartition("-")
    if host == socket.gethostname() and process.isdigit() and os.name == "posix":
        return not _alive(int(process))
    return time.time() - path.stat().st_mtime > DAY


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no number of a process
        return True
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time, where there are advisory locks; elsewhere the last wins, and wrote the same."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have none either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        text = f"model {name!r} is a hub id: pip install huggingface_hub, or give the path of a checkpoint"
        raise ModelError(text) from None
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED))
        )
    except Exception as error:
        cause = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"model {name!r} is no directory here, and cannot be downloaded from the hub "
            f"({type(error).__name__}: {cause}). "
            "Offline: give the path of a checkpoint, model=tiny, or model.load_format=dummy with a shape"
        ) from error
