"""`python -m headway new` writes packages that work as they are: installed in a fresh environment, one is
run, shown and checked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from core.cli import scaffold
from core.errors import ConfigError
from core.policy import ROLES
from core.testing import check, kit
from core.testing.subject import Subject

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = [role for role in ROLES if role not in scaffold.SETTLED]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """One package a role, named my_<role>."""
    into = tmp_path_factory.mktemp("packages")
    for role in WRITTEN:
        scaffold.write_package(role, f"my_{role}", into)
    return into


def test_every_package_passes_its_own_test(packages: Path) -> None:
    path = os.pathsep.join([str(ROOT), *(str(packages / f"my_{role}") for role in WRITTEN)])
    tests = [str(packages / f"my_{role}" / "tests" / f"test_my_{role}.py") for role in WRITTEN]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(packages),
        "-c",
        os.devnull,
        *tests,
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=packages, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("role", scaffold.POLICIES)
def test_every_policy_passes_the_kit(role: str, packages: Path) -> None:
    name = f"my_{role}"
    subject = Subject((f"{role}={name}",), (str(packages / name / f"headway_{name}.py"),))
    subject.refuse_what_cannot_be()
    for verdict in (
        *kit.check_runs(subject, range(20)),
        *kit.check_truth_boundary(subject, range(5)),
        *kit.check_starvation(subject, ()),
    ):
        assert not verdict.failed, check.explain(verdict)


def test_a_package_holds_what_an_author_needs(packages: Path) -> None:
    files = {
        str(p.relative_to(packages / "my_order"))
        for p in (packages / "my_order").rglob("*")
        if p.is_file() and "__pycache__" not in str(p)
    }
    assert files == {
        ".gitignore",
        "README.md",
        "headway_my_order.py",
        "pyproject.toml",
        "tests/test_my_order.py",
        "tests/test_my_order_rules.py",
    }
    for file in files:
        assert "$" not in (packages / "my_order" / file).read_text()


def test_a_package_says_what_it_is_in_english(packages: Path) -> None:
    said = {
        role: (packages / f"my_{role}" / "pyproject.toml")
        .read_text()
        .partition('description = "')[2]
        .partition(" for")[0]
        for role in WRITTEN
    }
    assert said["order"] == "An order" and said["scheduler"] == "A scheduler" and said["kernels"] == "Kernels"
    assert not [text for text in said.values() if re.match("A [aeiou]", text)]


@pytest.mark.parametrize(
    ("role", "name", "says"),
    [
        ("ordr", "mypaper", "Did you mean order"),
        ("order", "MyPaper", "lower-case letters"),
        ("order", "my-paper", "lower-case letters"),
        ("order", "3x", "a letter first"),
        ("order", "class", "cannot name a plugin"),
        ("order", "none", "cannot name a plugin"),
        ("order", "../x", "cannot name a plugin"),
        ("order", "sjf", "is there already, from plugins"),
        ("parallel", "mine", "not plugins"),
    ],
)
def test_what_cannot_be_is_refused(role: str, name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        scaffold.write_package(role, name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mypaper").mkdir()
    (tmp_path / "mypaper" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="nothing was written"):
        scaffold.write_package("order", "mypaper", tmp_path)
    assert [p.name for p in (tmp_path / "mypaper").iterdir()] == ["notes.txt"]


# ---- a stranger's package, for real ----------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path_factory):
    """Runs a command in a fresh virtual environment that holds Headway and `order=mypaper`, both installed
    with pip, without a network.

    What Headway depends on is borrowed from this environment: installing torch again would take minutes.
    """
    place = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
    python = place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    (site / "borrowed.pth").write_text(
        "\n".join(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))) + "\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*arguments: str) -> str:
        words = [str(python), *arguments]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "--disable-pip-version-check",
        "install",
        "-q",
    ]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "-e", str(ROOT)], check=True, env=environment)
    run("-m", "headway", "new", "order", "mypaper")
    subprocess.run([*pip, *offline, "-e", str(place / "mypaper")], check=True, env=environment)
    return run


def test_a_stranger_s_package_works_with_no_edit_anywhere(stranger, tmp_path: Path) -> None:
    # It is listed, with where it comes from and its parameters.
    found = json.loads(stranger("-m", "headway", "plugins", "order", "--json"))
    assert found["broken"] == []
    (mine,) = [p for p in found["plugins"] if p["name"] == "mypaper"]
    assert (mine["dist"], mine["version"], mine["origin"]) == ("headway-mypaper", "0.1.0", "headway_mypaper")
    patience = {"name": "patience", "type": "float", "default": 100.0, "range": "0 to 1e+09, tokens a second"}
    assert mine["parameters"] == [patience]

    # It runs, and its parameters are in the help.
    sim = [
        "executor=sim",
        "model=qwen3_0_6b",
        "tracking=none",
        "workload.num_requests=8",
        f"hydra.run.dir={tmp_path}",
    ]
    assert "order=mypaper" in stranger(str(ROOT / "run.py"), "order=mypaper", "order.patience=3", *sim)
    assert json.loads((tmp_path / "summary.json").read_text())["completed"] == 8
    help = stranger(str(ROOT / "run.py"), "order=mypaper", "--help")
    assert "mypaper" in help and "order.patience=100.0" in help and "0 to 1e+09, tokens a second" in help

    # The kit checks it, here as pytest knows it.
    answer = stranger(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "core.testing",
        "--policy",
        "order=mypaper",
        "--policy-seeds",
        "5",
    )
    assert "6 passed" in answer


# ---- docs/writing-a-plugin.md ----------------------------------------------------------------------------


def test_the_page_on_writing_a_plugin_holds_code_that_works(tmp_path: Path, monkeypatch) -> None:
    plugin, test = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "writing-a-plugin.md").read_text(), re.DOTALL
    )
    file = tmp_path / "headway_myvtc.py"
    file.write_text(plugin)
    monkeypatch.syspath_prepend(tmp_path)
    for verdict in kit.check_runs(Subject(("order=myvtc",), (str(file),)), range(20)):
        assert not verdict.failed, check.explain(verdict)
    scope: dict = {}
    exec(test, scope)
    scope["test_two_backlogged_clients_are_served_alike"]()
