"""policy=NAME: what each preset chooses keeps the rules of the conformance kit, and stands in
docs/policies.md."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_dir
from test_conformance import in_the_box

from core.cli import presets, schema
from core.cli.main import main
from core.compose.hooks import load_registry, said_to_differ
from core.errors import ConfigError
from core.testing import check, kit
from core.testing.subject import Subject
from experiments import policies_page


def of_one_policy() -> list[str]:
    """Presets that set a single role: test_conformance.py checks that very composition, with more seeds."""
    return [name for name in presets.names() if len(presets.words(name)) == 1]


def test_a_preset_of_one_policy_is_checked_as_that_policy() -> None:
    assert of_one_policy() == ["lcf", "mooncake"]
    assert {word for name in of_one_policy() for word in presets.words(name)} <= set(in_the_box())


@pytest.mark.parametrize("name", [name for name in presets.names() if name not in of_one_policy()])
def test_every_preset_passes_the_conformance_kit(name: str) -> None:
    subject = Subject(tuple(presets.words(name)))
    subject.refuse_what_cannot_be()
    seeds = range(6)
    parts = [kit.check_runs(subject, seeds), kit.check_truth_boundary(subject, seeds[:3])]
    parts += [kit.check_starvation(subject, seeds), kit.check_parity(subject, seeds[:1])]
    for verdict in (v for part in parts for v in part):
        assert not verdict.failed, check.explain(verdict)


@pytest.fixture(scope="module")
def hydra_composes():
    schema.register(load_registry())
    with initialize_config_dir(str(presets.FOLDER.parent), version_base="1.3"):
        yield lambda *words: schema.composition(hydra.compose("config", list(words)))


@pytest.mark.parametrize("name", presets.names())
def test_the_words_of_a_preset_are_what_hydra_composes(name: str, hydra_composes) -> None:
    composed = hydra_composes(f"policy={name}").choices
    for role, (choice, given) in Subject(tuple(presets.words(name))).choices.items():
        assert composed[role][0] == choice
        assert {key: composed[role][1][key] for key in given} == given


def test_the_kit_checks_a_preset_by_its_name(capsys) -> None:
    assert main(["check", "policy=lcf", "--only", "runs", "--seeds", "3"]) == 0
    assert "checking victim=lcf" in capsys.readouterr().out
    assert main(["check", "policy=lfc"]) == 2
    assert "there is no such preset. Did you mean lcf" in capsys.readouterr().err


def test_a_role_named_beside_a_preset_is_not_the_presets() -> None:
    assert presets.expanded(["policy=vtc", "--seeds", "3"])[:2] == ["scheduler=prefill_first", "order=vtc"]
    assert "order=vtc" not in presets.expanded(["policy=vtc", "order=fcfs"])
    assert "scheduler.watermark=0.01" not in presets.expanded(["policy=vllm_v0", "scheduler=orca"])
    with pytest.raises(ConfigError, match="policy=vct: there is no such preset"):
        presets.expanded(["policy=vct"])


# ---- docs/policies.md ------------------------------------------------------------------------------------


def test_the_page_of_policies_is_what_the_plugins_and_presets_say() -> None:
    assert policies_page.PAGE.read_text(encoding="utf-8") == policies_page.page(), (
        "docs/policies.md is not up to date: run python experiments/policies_page.py"
    )


def test_every_test_that_the_page_names_is_there() -> None:
    folder = Path(__file__).parent
    for role, (_, tests) in policies_page.TESTS.items():
        for name in tests:
            file, _, test = policies_page.test_of(role, name).partition("::")
            assert f"def {test}(" in (folder / file).read_text(), f"{role}={name}: there is no {file}::{test}"


def test_the_page_says_what_a_docstring_says_to_be_missing_and_nothing_else() -> None:
    doc = """One line (Paper 1).

    alpha: a number. Not hereabouts.

    It does. Differs: in this, and that. It goes on. Not here: more. `x` is said.
    Not here: the end.
    """
    assert said_to_differ(doc) == "Differs: in this, and that. Not here: more. Not here: the end."
