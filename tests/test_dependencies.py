"""What `pip install -e .` brings is enough for a simulation; the real engine and the tracker are extras,
missed by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Packages of the extras, as they are imported.
EXTRA = (
    "torch",
    "triton",
    "flash_attn",
    "safetensors",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "transformers",
    "wandb",
    "gguf",
    "altair",
)
BARE = f"""
import runpy, sys
sys.modules |= dict.fromkeys({EXTRA!r})  # None: an import of it fails
sys.argv[0] = {str(ROOT / "run.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python run.py` in an interpreter that has none of the extras."""
    command = [sys.executable, "-c", BARE, *arguments, f"hydra.run.dir={folder}"]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_a_simulation_needs_no_extra(tmp_path: Path) -> None:
    done = bare(
        tmp_path / "run", "executor=sim", "model=qwen3_8b", "workload=random", "workload.num_requests=20"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["completed"] == 20
    assert "wandb cannot be imported" in done.stderr and ".[wandb]" in done.stderr
    assert (tmp_path / "run" / "requests.parquet").exists() and (tmp_path / "run" / "replay.npz").exists()


@pytest.mark.parametrize("model", ["tiny", "qwen3_8b"])
def test_the_real_engine_names_its_extra(tmp_path: Path, model: str) -> None:
    done = bare(tmp_path / "run", f"model={model}", "tracking=none")
    assert (
        done.returncode == 2
        and "executor=torch needs torch, safetensors, tokenizers, jinja2, which are not installed"
        in done.stderr
    )
    assert '`pip install -e ".[torch]"`' in done.stderr and "executor=sim" in done.stderr


def imported(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement).group().replace("-", "_") for requirement in requirements}


def test_no_extra_is_asked_for_by_everybody() -> None:
    extras = PROJECT["optional-dependencies"]
    offered = set.union(*(imported(extras[name]) for name in ("torch", "wandb", "gpu", "smollm2", "report")))
    assert offered - {"headway", "vl_convert_python"} <= set(EXTRA)
    assert not imported(PROJECT["dependencies"]) & set(EXTRA)
