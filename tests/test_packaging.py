"""Headway is installed in place: a wheel is refused, and another package that is called `core` is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_a_wheel_is_refused_in_plain_words_and_nothing_is_written(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "headway.py", "run.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    before = sorted(p.name for p in tmp_path.iterdir())
    done = python("setup.py", "-q", "bdist_wheel", cwd=tmp_path, path=[])
    assert (
        done.returncode == 1 and "headway builds no wheel" in done.stderr and "pip install -e" in done.stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("stranger", ["core.py", "core/__init__.py"])
def test_another_package_called_core_is_named(tmp_path: Path, stranger: str) -> None:
    file = tmp_path / stranger
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    done = python("-c", "import headway", cwd=tmp_path, path=[tmp_path, ROOT])
    assert (
        done.returncode == 1
        and f"the package `core` that is imported here is {file}, not Headway's" in done.stderr
    )


def test_headway_is_imported_from_any_folder(tmp_path: Path) -> None:
    assert python("-c", "import headway", cwd=tmp_path, path=[ROOT]).stderr == ""
