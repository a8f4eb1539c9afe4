"""Code in the documents is as good as code in the tree: it passes ruff, it runs, and it decides what the
pages say. And what files hold is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from core.compose.build import Composition, build
from core.compose.config import EngineConfig
from core.compose.defaults import default_choices
from core.compose.hooks import load_registry
from core.inputs import SLO
from core.measure.metrics import summarize
from core.testing import kit
from core.testing.subject import Subject
from core.testing.trial import Trial
from plugins.schedulers.order.vtc import VirtualTokenCounter

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
BLOCKS = {
    f"{page} block {i}": block
    for page in PAGES
    for i, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    )
}
GUIDE = [name for name in BLOCKS if name.startswith("docs/writing-a-plugin.md")]


def executed(name: str, module: str) -> ModuleType:
    """A block as a module of its own, as a reader who saves it to a file would have it."""
    made = ModuleType(module)
    sys.modules[module] = made  # dataclasses look their module up
    exec(compile(BLOCKS[name], name, "exec"), vars(made))
    return made


@pytest.fixture
def myvtc():
    """The guide's plugin, importable by the name that the guide's test imports."""
    yield executed(GUIDE[0], "headway_myvtc")
    del sys.modules["headway_myvtc"]


def test_the_pages_hold_the_examples_that_these_tests_are_about() -> None:
    assert {name.partition(" ")[0] for name in BLOCKS} >= {
        "README.md",
        "CONTRIBUTING.md",
        "docs/writing-a-plugin.md",
    }


@pytest.mark.parametrize("name", BLOCKS)
def test_every_example_passes_ruff(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    # the guide's files are in a package of their own, where Headway is third-party
    place = tmp_path if name in GUIDE else ROOT
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--config", str(ROOT / "pyproject.toml")]
    command += ["--stdin-filename", str(place / "example.py"), "-"]
    done = subprocess.run(command, input=BLOCKS[name], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", BLOCKS)
def test_every_example_runs_as_it_stands(name: str, myvtc: ModuleType) -> None:
    example = executed(name, "example")
    registry = load_registry()
    if hasattr(example, "headway_register"):
        known = set(registry.plugins)
        example.headway_register(registry)
        (added,) = set(registry.plugins) - known
        role, choice = added
        assert role in ("order", "eviction", "victim"), "the composition below takes one of these"
        choices = {
            **default_choices(),
            "executor": ("sim", {}),
            "workload": ("random", {"num_requests": 6, "input_len": [3, 30], "output_len": 4}),
        } | {role: (choice, {})}
        result = build(registry, Composition(choices, EngineConfig(4, 100), kit.SHAPE)).execute()
        assert [o.state for o in result.outputs] == ["finished"] * 6
    tests = [function for key, function in vars(example).items() if key.startswith("test_")]
    for function in tests:
        function()
    assert tests or hasattr(example, "headway_register"), (
        "an example is a plugin or a test: say here what else it may be"
    )


def test_the_guides_policy_decides_as_the_one_in_the_box(myvtc: ModuleType) -> None:
    subject = Subject(("order=vtc",))

    def decisions(seed: int, order: type) -> list[str]:
        def roles(case):
            made = subject.roles(case)
            made["order"] = order()
            made["order"].plugin_name = "order=vtc"
            return made

        return [str(decision) for decision in Trial(subject.case(seed), roles).run().decisions]

    compared = 0
    for seed in range(80):
        theirs = decisions(seed, VirtualTokenCounter)
        assert decisions(seed, myvtc.Myvtc) == theirs, f"seed {seed}"
        compared += len(theirs)
    assert compared > 1000


# ---- docs/metrics.md -------------------------------------------------------------------------------------


def names_in(page: str) -> set[str]:
    """Everything between backticks in the first column of a table, `mean_*_ms` and its like written out."""
    text = (ROOT / page).read_text()
    names = {
        name
        for cell in re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cell)
    }
    for name in [n for n in names if "*" in n]:
        names |= {name.replace("*", latency) for latency in ("ttft", "tpot", "itl", "e2el")}
    return names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has everything that a summary may hold: clients, targets, a refusal, a policy that sees
    the truth."""
    directory = tmp_path_factory.mktemp("run")
    choices = {
        **default_choices(order="sjf", predictor="oracle"), "executor": ("sim", {}),
        "workload": ("random", {"num_requests": 12, "clients": 2, "input_len": [5, 300], "output_len": 4}),
    }  # fmt: skip
    composition = Composition(choices, EngineConfig(4, 200), kit.SHAPE, slo=SLO(ttft=1.0))
    return directory, build(load_registry(), composition, directory=directory).execute()


def test_every_number_of_a_summary_is_defined(run) -> None:
    summary = summarize(run[1])
    assert {"rejections", "saw_truth", "slo_attainment", "jain_index"} <= summary.keys()
    assert not summary.keys() - names_in("docs/metrics.md")


@pytest.mark.parametrize("file", ["requests.parquet", "steps.parquet", "decisions.parquet"])
def test_every_column_of_a_table_is_defined(run, file: str) -> None:
    section = (ROOT / "docs" / "metrics.md").read_text().partition(f"### `{file}`")[2].partition("\n#")[0]
    named = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE))))
    assert named == set(pq.read_schema(run[0] / file).names)


def test_every_fact_about_rejections_is_defined(run) -> None:
    kinds = json.loads(json.dumps(summarize(run[1])["rejections"]))
    assert kinds and set(kinds[0]) == {"count", "reason"}
