"""A run's own directory: what it was, on what it ran, how it ended. `result.json` is written also for a run that failed."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULT, SUMMARY, VERSIONS, CONFIG = "result.json", "summary.json", "versions.json", "config.yaml"
PACKAGES = ("torch", "triton", "flash-attn", "transformers", "numpy", "hydra-core", "omegaconf", "pluggy", "pyarrow", "wandb")


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all; nan becomes null, since JSON has no nan."""
    scratch = path.with_suffix(f"{path.suffix}.part")
    scratch.write_text(json.dumps(_plain(data), indent=2, default=str) + "\n")
    scratch.replace(path)


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_result(
    directory: Path,
    status: str,
    summary: dict[str, Any],
    *,
    error: str = "",
    traceback: str = "",
    overrides: Iterable[str] = (),
    seed: int | None = None,
) -> None:
    """How the run ended: "finished", "interrupted" or "failed". Comparisons read this file and nothing else."""
    given = list(overrides)
    data = {"status": status, "error": error, "overrides": given, "seed": seed, "summary": summary}
    write_json(directory / RESULT, data | ({"traceback": traceback} if traceback else {}))


def environment() -> dict[str, Any]:
    """Versions and hardware, as far as they can be learnt without importing anything heavy."""
    torch = sys.modules.get("torch")  # a run that never imported it ran without it
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch and torch.cuda.is_available() else []
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
    root = Path(__file__).resolve().parent.parent
    try:
        sha = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        dirty = subprocess.run(["git", "-C", str(root), "diff", "--quiet", "HEAD"], capture_output=True, timeout=10, check=False).returncode
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{sha}-dirty" if dirty else sha


def _cpu() -> str:
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# ---- comparing the runs of a sweep ----------------------------------------------------------------------------------


def read_results(sweep: Path) -> list[dict[str, Any]]:
    """Every `result.json` below a folder, in the order of its jobs; a folder that has none yet is left out."""
    found = sorted(sweep.glob(f"*/{RESULT}"), key=lambda p: (len(p.parent.name), p.parent.name))
    return [json.loads(path.read_text()) | {"directory": str(path.parent)} for path in found]


def varied(results: list[dict[str, Any]]) -> list[str]:
    """The override keys that are not the same in all runs."""
    values: dict[str, set[str]] = {}
    for r in results:
        own = dict(o.partition("=")[::2] for o in r["overrides"])
        for key in own:
            values.setdefault(key, set()).add(own[key])
    return [key for key, seen in values.items() if len(seen) > 1]


def same_decisions(results: list[dict[str, Any]]) -> list[list[int]]:
    """Groups of finished runs (their places in `results`) that took the same decisions and gave as many tokens."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, r in enumerate(results):
        facts = tuple(r["summary"].get(k) for k in ("decision_hash", "num_steps", "num_requests", "total_output_tokens"))
        if r["status"] == "finished" and all(facts):
            groups.setdefault(facts, []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def comparison(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a run: what was varied, how it ended, its summary, and in `same_decisions_as` the jobs that it equals."""
    keys = varied(results)
    rows = []
    for r in results:
        own = dict(o.partition("=")[::2] for o in r["overrides"])
        problem = (r["error"].splitlines() or [""])[0]
        rows.append({"job": Path(r["directory"]).name} | {k: own.get(k, "") for k in keys} | r["summary"] | {"status": r["status"], "error": problem})
    for group in same_decisions(results):
        for i in group:
            rows[i]["same_decisions_as"] = [rows[j]["job"] for j in group if j != i]
    return rows
