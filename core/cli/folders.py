"""Whose folder it is: names that one process claims, locks while it is written, jobs known by their config.

A job's number and its overrides do not say what it is: a sweep may be started again with other values, in
another order, or after a file of conf/ has changed. So a job's folder holds the hash of its composed config,
and is found by that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from ..interrupts import say
from ..measure import results

HYDRA = ".hydra"  # where Hydra's own tools look for a job's config and overrides
IDENTITY = "identity"  # in HYDRA: the hash of the composed config
LOCK = ".headway.lock"


class Refused(ConfigError):
    """A folder that a run may not write into, not even that it was refused."""


class InUse(Refused):
    """Another process writes into this folder now."""


class Lock:
    """A folder that no other process may write into until `release`. The kernel lets go for one that dies."""

    def __init__(self, folder: Path) -> None:
        """Raises InUse with the process that has the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self._file, 1000).decode(errors="replace").strip() or "another process"
                os.close(self._file)
                message = f"{folder}: {holder} writes into this folder now"
                raise InUse(f"{message}. Wait for its end, or choose another folder") from None
            except OSError as error:
                say(f"warning: {folder} cannot be locked ({error}): let nothing else write there", error=True)
            if self._is_there():
                break
            os.close(self._file)  # its last holder removed it between the two calls
        with suppress(OSError):  # a full disk; the lock itself needs no room
            os.ftruncate(self._file, 0)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            os.pwrite(self._file, f"{holder}, since {datetime.now():%Y-%m-%d %H:%M:%S},".encode(), 0)

    def _is_there(self) -> bool:
        try:
            return os.stat(self.path).st_ino == os.fstat(self._file).st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        with suppress(OSError):
            self.path.unlink()
        os.close(self._file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def claim(wanted: Path) -> Path:
    """Makes a folder that nobody else has: `wanted`, or the next name (03-07-51-2) where that is taken."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for n in count(1):
        folder = wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count never ends")


class Claims:
    """The folders that this process has claimed by name: once each, however often Hydra asks."""

    def __init__(self) -> None:
        self._folders: dict[str, Path] = {}

    def register(self) -> None:
        """Makes `${headway.folder:outputs/...}` claim a folder when it is resolved, which only a run does."""
        OmegaConf.register_new_resolver("headway.folder", self._claimed, replace=True)

    def _claimed(self, wanted: str) -> str:
        if wanted not in self._folders:
            self._folders[wanted] = claim(Path(wanted))
        return str(self._folders[wanted])

    def give_back_empty(self) -> None:
        """A folder in which no job began holds nothing that anybody wants."""
        for folder in self._folders.values():
            with suppress(OSError):
                if {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
                    (folder / "multirun.yaml").unlink(missing_ok=True)
                    folder.rmdir()
                    folder.parent.rmdir()


def identity(cfg: DictConfig) -> str:
    """The hash of a composed config with everything resolved: two jobs with one identity do the same."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:32]


def identity_of(folder: Path) -> str:
    """Of the job that a folder belongs to; "" for a folder that is no job's, or of an earlier version."""
    try:
        return (folder / HYDRA / IDENTITY).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


class Sweep:
    """A sweep's folder, which this process holds until `release`, and whose its jobs' folders are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._is_new = folder, not folder.exists()
        self._lock = Lock(folder)
        self._known: dict[str, Path] | None = None  # identity -> folder

    def job(self, wanted: str, identity: str) -> Path:
        """The folder of a job: the one it has had, whatever its number was, else a free one, made here."""
        if self._known is None:
            depth = "*/" * len(Path(wanted).parts)
            found = [path.parent.parent for path in self.folder.glob(f"{depth}{HYDRA}/{IDENTITY}")]
            self._known = {identity_of(folder): folder for folder in found}
        if identity not in self._known:
            self._known[identity] = self._free(wanted)
        return self._known[identity]

    def _free(self, wanted: str) -> Path:
        for n in count():
            name = str(int(wanted) + n) if wanted.isdecimal() else f"{wanted}-{n + 1}" if n else wanted
            folder = self.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            if not _is_a_jobs(folder):
                return folder
        raise AssertionError("count never ends")

    def release(self) -> None:
        self._lock.release()
        if self._is_new:
            with suppress(OSError):
                self.folder.rmdir()  # where no job began


def _is_a_jobs(folder: Path) -> bool:
    return any((folder / name).exists() for name in (HYDRA, results.RESULT, results.CONFIG, results.SUMMARY))


def check_inputs(folder: Path, cfg: DictConfig) -> None:
    """Raises Refused where a job would read what `prepare` removes, as a replay reads its record."""
    for value in _paths(OmegaConf.to_container(cfg, resolve=True)):
        if _is_own(value, folder):
            raise Refused(
                f"{value}: this run's own files would replace it in {folder}: choose another folder"
            )


def prepare(folder: Path, cfg: DictConfig, overrides: list[str], identity: str) -> None:
    """Makes a folder a job's: an earlier run's files go, then the config in Hydra's form and whose it is."""
    results.remove_run(folder)
    hydra = folder / HYDRA
    hydra.mkdir(exist_ok=True)
    (hydra / "hydra.yaml").unlink(missing_ok=True)  # of an earlier version
    results.write_text(hydra / IDENTITY, f"{identity}\n")
    results.write_text(hydra / "config.yaml", OmegaConf.to_yaml(cfg))
    results.write_text(hydra / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))


def _paths(data: Any) -> Iterator[str]:
    """What the parameters called `path` say, of whatever plugin."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key == "path" and isinstance(value, str):
                yield value
            yield from _paths(value)


def _is_own(value: str, folder: Path) -> bool:
    """Whether a path is that of the folder, or of a file that a run writes there."""
    own = [folder, *(folder / name for name in (results.RESULT, results.CONFIG, *results.FILES))]
    try:
        return (
            bool(value)
            and Path(value).exists()
            and any(path.exists() and path.samefile(value) for path in own)
        )
    except (OSError, ValueError):
        return False
