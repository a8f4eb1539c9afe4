"""A run's own directory: what it was, on what it ran, how it ended. `result.json` is written also for a run
that failed."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import HeadwayError
from ..renamed import renamed

RESULT, SUMMARY, VERSIONS, CONFIG = "result.json", "summary.json", "versions.json", "config.yaml"
#: What `results.files` chooses from. result.json and the config are written always.
TABLES = ("requests.parquet", "steps.parquet", "decisions.parquet")
FILES = (SUMMARY, VERSIONS, *TABLES, "timeline.json", "replay.npz")
STATUSES = ("finished", "interrupted", "failed")
PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "transformers",
    "numpy",
    "hydra-core",
    "omegaconf",
    "pluggy",
    "pyarrow",
    "wandb",
)
_SCRATCH = ".part"
_ROOM = ".room"


class Unwritable(HeadwayError, OSError):
    """A file cannot be written: a full disk, a missing right; names the file."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`, to be written in the block. It becomes `path` when the block ends, and is
    on the disk by then; when the block fails, nothing of it stays and an earlier `path` is as it was.
    Raises Unwritable."""
    scratch = path.with_name(path.name + _SCRATCH)
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException as error:
        with suppress(OSError):
            scratch.unlink()
        if isinstance(error, OSError) and not isinstance(error, Unwritable):
            reason = os.strerror(error.errno) if error.errno else error
            raise Unwritable(f"{path}: cannot be written: {reason}") from error
        raise


def write_text(path: Path, text: str) -> None:
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, indent: int | None = 2) -> None:
    """Whole or not at all; nan becomes null, since JSON has no nan."""
    write_text(path, json.dumps(_plain(data), indent=indent, default=str) + "\n")


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


class Room:
    """Room on the disk for result.json, kept while a job runs: a full disk costs other files first."""

    def __init__(self, directory: Path, size: int = 1 << 14) -> None:
        """Raises Unwritable where there is no room even now."""
        self._path = directory / _ROOM
        with whole(self._path) as scratch:
            scratch.write_bytes(b"\0" * size)

    def give_up(self) -> None:
        with suppress(OSError):
            self._path.unlink()


def remove_run(directory: Path) -> None:
    """Removes what an earlier run wrote here, result.json first: what is left half-way is no run."""
    for name in (RESULT, CONFIG, *FILES, _ROOM):
        for path in (directory / name, directory / f"{name}{_SCRATCH}"):
            path.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions and hardware, as far as they can be learnt without importing anything heavy."""
    torch = sys.modules.get("torch")  # a run that never imported it ran without it
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch and torch.cuda.is_available()
        else []
    )
    return {
        "git_sha": git_sha(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "gpus": gpus,
        "cuda": getattr(getattr(torch, "version", None), "cuda", None),
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "argv": sys.argv,
    }


def git_sha() -> str:
    """Of the checkout this code lies in, "-dirty" where it differs from it, "" outside of one."""
    root = Path(__file__).resolve().parents[2]
    try:
        sha = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(root), "diff", "--quiet", "HEAD"], capture_output=True, timeout=10, check=False
        ).returncode
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{sha}-dirty" if dirty else sha


def _cpu() -> str:
    try:
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# ---- comparing the runs of a sweep -----------------------------------------------------------------------


class Unreadable(HeadwayError):
    """A file of an earlier run is empty, cut or something else; says which and why."""


def read_result(directory: Path) -> dict[str, Any] | None:
    """How the run in a directory ended, None where none has. Raises Unreadable."""
    if not (directory / RESULT).exists():
        return None
    result = _read_json(directory / RESULT)
    expected = {"status": str, "error": str, "overrides": list, "summary": dict}
    wrong = [name for name, kind in expected.items() if not isinstance(result.get(name), kind)]
    if wrong or result["status"] not in STATUSES or not all(isinstance(o, str) for o in result["overrides"]):
        what = ", ".join(wrong) or "status or overrides"
        raise Unreadable(f"{directory / RESULT}: is no result of a run ({what})")
    if (directory / SUMMARY).exists():
        _read_json(directory / SUMMARY)
    overrides = [renamed(override) for override in result["overrides"]]
    return result | {"directory": str(directory), "overrides": overrides}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(data, dict):
        raise Unreadable(f"{path}: holds {type(data).__name__}, expected an object")
    return data


def read_results(sweep: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """How every run below a directory ended, in the order of jobs, and what is wrong with unreadable ones."""
    found, problems = [], []
    for path in sorted(sweep.glob(f"*/{RESULT}"), key=lambda p: (len(p.parent.name), p.parent.name)):
        try:
            if (result := read_result(path.parent)) is not None:
                found.append(result)
        except Unreadable as problem:
            problems.append(str(problem))
    return found, problems


def varied(results: list[dict[str, Any]]) -> list[str]:
    """The override keys that are not the same in all runs."""
    values: dict[str, set[str]] = {}
    for r in results:
        own = dict(o.partition("=")[::2] for o in r["overrides"])
        for key in own:
            values.setdefault(key, set()).add(own[key])
    return [key for key, seen in values.items() if len(seen) > 1]


def same_decisions(results: list[dict[str, Any]]) -> list[list[int]]:
    """Groups of finished runs (their places in `results`) that took the same decisions and gave as many
    tokens."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, r in enumerate(results):
        facts = tuple(
            r["summary"].get(k) for k in ("decision_hash", "num_steps", "num_requests", "total_output_tokens")
        )
        if r["status"] == "finished" and all(facts):
            groups.setdefault(facts, []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def comparison(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per run: what was varied, how it ended, its summary, and in `same_decisions_as` the jobs that
    it equals."""
    keys = varied(results)
    rows = []
    for r in results:
        own = dict(o.partition("=")[::2] for o in r["overrides"])
        problem = (r["error"].splitlines() or [""])[0]
        rows.append(
            {"job": Path(r["directory"]).name}
            | {k: own.get(k, "") for k in keys}
            | r["summary"]
            | {"status": r["status"], "error": problem}
        )
    for group in same_decisions(results):
        for i in group:
            rows[i]["same_decisions_as"] = [rows[j]["job"] for j in group if j != i]
    return rows
