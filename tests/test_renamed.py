"""Former names. The role `chunk` was called `budget`, which means the same wherever a role is named from
outside; what else was renamed goes on to work, or is refused with its name of today."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.policy_runs import ask, compose, run

import headway
from core.cli import main as cli
from core.cli.arguments import arguments
from core.cli.scaffold import write_package
from core.compose.build import Composition
from core.compose.config import EngineConfig
from core.compose.defaults import default_choices
from core.compose.facts import differences
from core.compose.hooks import Origin, Registry
from core.errors import ConfigError
from core.measure.results import comparison, read_results
from core.policy import ROLES
from core.renamed import FORMER_NAMES, renamed, with_names_of_today
from core.testing.subject import Subject
from headway import ChunkSize

ROOT = Path(__file__).resolve().parent.parent


def test_former_names_lead_to_roles_and_are_none():
    assert set(FORMER_NAMES.values()) <= set(ROLES) and not set(FORMER_NAMES) & set(ROLES)


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ("budget", "chunk"),
        ("budget=fixed,dynamic_chunk", "chunk=fixed,dynamic_chunk"),
        ("++budget.chunk_size=64", "++chunk.chunk_size=64"),
        ("~budget", "~chunk"),
        ("scheduler.token_budget=64", "scheduler.token_budget=64"),
        ("budgets=1", "budgets=1"),
        ("scheduler=budget", "scheduler=budget"),
        ("experiment=budget", "experiment=budget"),
    ],
)
def test_the_role_at_the_head_of_a_word_gets_its_name_of_today_and_nothing_else_does(former, today):
    assert renamed(former) == today
    assert arguments([former], ROOT / "conf")[0] == [today]


def test_both_names_at_once_are_refused():
    with pytest.raises(ConfigError, match="budget and chunk are both given"):
        with_names_of_today({"budget": 1, "chunk": 2})
    assert with_names_of_today({"order": 1, "budget.chunk_size": 2}) == {"order": 1, "chunk.chunk_size": 2}


ASKED = [ask(0.0, 100, 3, "a"), ask(0.0, 70, 2, "b")]


def decisions(**choices) -> str:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=2048)
    return run(ASKED, engine=config, **choices).decision_hash


def test_python_composes_the_same_by_either_name():
    size = ("fixed", {"chunk_size": 32})
    assert decisions(budget=size) == decisions(chunk=size) != decisions()
    assert compose(budget=size).roles.chunk.plugin_name == "chunk=fixed"
    assert Composition(default_choices(budget=size)).choices["chunk"] == size
    assert Subject(("budget=fixed", "budget.chunk_size=8")).choices["chunk"] == ("fixed", {"chunk_size": 8})
    with pytest.raises(ConfigError, match="budget and chunk are both given"):
        compose(budget=size, chunk=size)


def test_llm_takes_either_name():
    llm = headway.LLM("tiny", device="cpu", num_blocks=64, budget={"name": "fixed", "chunk_size": 4})
    assert llm.engine.roles.chunk.chunk_size == 4
    llm.close()


WRITTEN_BEFORE = """
from dataclasses import dataclass
from headway import TokenBudget, hookimpl

@dataclass
class Halves(TokenBudget):
    '''Half of what is left.'''
    least: int = 4
    def tokens(self, request, left, view):
        return min(left, max(self.least, left // 2))

@hookimpl
def headway_register(registry):
    registry.add("budget", "halves", Halves)
"""


def test_a_plugin_that_was_written_for_the_former_name_works(tmp_path):
    (tmp_path / "halves_of_before.py").write_text(WRITTEN_BEFORE)
    subject = Subject(("budget=halves",), (str(tmp_path / "halves_of_before.py"),))
    assert isinstance(subject.plain_roles()["chunk"], ChunkSize) and not subject.registry.broken
    assert headway.TokenBudget is ChunkSize and headway.Oracle is headway.Truth


def test_a_policy_that_declares_to_see_the_truth_by_the_former_name_is_told_todays():
    """It would be handed no truth, and its results would not be stamped."""
    with pytest.raises(headway.PluginError, match=r"Knows: `oracle` is called `sees_truth` now"):

        class Knows(headway.Order):
            oracle = True


def test_two_plugins_of_one_name_are_refused_under_whichever_name_of_the_role():
    registry = Registry()
    registry.register(sys.modules["plugins.schedulers.chunk.fixed"], Origin("first", "first.py"))
    with pytest.raises(headway.PluginError, match="chunk=fixed is registered twice"):
        registry.add("budget", "fixed", registry.get("budget", "fixed").factory)


def test_a_package_that_is_asked_for_by_the_former_name_is_one_of_today(tmp_path, capsys):
    written = write_package("budget", "halves_of_now", tmp_path)
    source = next(path for path in written if path.name == "headway_halves_of_now.py").read_text()
    assert 'registry.add("chunk", "halves_of_now"' in source
    assert cli.main(["plugins", "budget"]) == 0 and "\nchunk: how many" in "\n" + capsys.readouterr().out


# ---- runs that are there already -------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, *words]
    return subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=120)


def into_former_names(run: Path) -> None:
    """The files of a run as they were written when the role was called `budget`."""
    config = run / ".hydra" / "config.yaml"
    node = yaml.safe_load(config.read_text())
    node["budget"] = node.pop("chunk")
    config.write_text(yaml.safe_dump(node))
    (run / "config.yaml").write_text(yaml.safe_dump(node))
    result = json.loads((run / "result.json").read_text())
    result["overrides"] = [word.replace("chunk=", "budget=") for word in result["overrides"]]
    result["overrides"] = [word.replace("chunk.chunk", "budget.chunk") for word in result["overrides"]]
    (run / "result.json").write_text(json.dumps(result))
    with np.load(run / "replay.npz", allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    meta = json.loads(str(arrays["meta"]))
    facts = {
        name.replace("chunk", "budget", name.startswith("chunk")): v for name, v in meta["facts"].items()
    }
    arrays["meta"] = np.array(json.dumps(meta | {"facts": facts}))
    np.savez(run / "replay.npz", **arrays)


WORDS = ["executor=sim", "model=qwen3_0_6b", "workload=random", "workload.num_requests=12", "tracking=none"]


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A run with the role's former name on its command line and in all of its files."""
    folder = tmp_path_factory.mktemp("runs") / "before"
    done = command("run.py", *WORDS, "budget=fixed", "budget.chunk_size=64", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder, folder.parent / "now")
    into_former_names(folder)
    return folder


def hash_of(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["decision_hash"]


def test_the_former_name_on_a_command_line_is_stored_under_todays(before):
    result = json.loads((before.parent / "now" / "result.json").read_text())
    assert [word for word in result["overrides"] if "chunk" in word] == ["chunk=fixed", "chunk.chunk_size=64"]
    assert "budget" in (before / "result.json").read_text()  # what the next tests read


def test_a_stored_config_runs_again_and_decides_the_same(before, tmp_path):
    done = command(
        "run.py", "-cp", str(before / ".hydra"), "-cn", "config", f"hydra.run.dir={tmp_path}/again"
    )
    assert done.returncode == 0, done.stderr
    assert hash_of(tmp_path / "again") == hash_of(before)


def test_runs_of_either_time_stand_in_one_column(before):
    results, problems = read_results(before.parent)
    assert not problems and len(results) == 2
    rows = comparison([*results, results[0] | {"overrides": ["chunk=dynamic_chunk"]}])
    assert [row["chunk"] for row in rows] == ["fixed", "fixed", "dynamic_chunk"]


def test_a_record_replays_and_asks_what_if(before, tmp_path, capsys):
    replay = ["executor=replay", f"executor.path={before}", f"hydra.run.dir={tmp_path}/replayed"]
    done = command("run.py", *WORDS[1:], "chunk=fixed", "chunk.chunk_size=64", *replay)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hash_of(tmp_path / "replayed") == hash_of(before)
    assert cli.main(["whatif", str(before), "budget.chunk_size=8", "--json"]) == 0
    assert [change["change"] for change in json.loads(capsys.readouterr().out)["changes"]] == [
        "chunk.chunk_size=8"
    ]


def test_facts_of_either_time_are_compared_by_todays_names():
    assert not differences(
        {"budget": "fixed", "budget.chunk_size": 8}, {"chunk": "fixed", "chunk.chunk_size": 8}
    )
    assert differences({"budget": "fixed"}, {"chunk": "x"}) == ['chunk="x", recorded with "fixed"']


# ---- what cannot be read under the former name says so ---------------------------------------------------


@pytest.mark.parametrize("text", ["defaults:\n  - override /budget: fixed\n", "budget: {name: fixed}\n"])
def test_a_config_of_ones_own_that_names_the_role_as_before_is_told_todays_name(tmp_path, text):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    done = command("run.py", "-cd", str(tmp_path), "experiment=mine", *WORDS, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode != 0 and "budget: is called chunk now" in done.stderr
