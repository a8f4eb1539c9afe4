"""`python run.py --help`: every group, option, parameter, default and comment, and only those that were asked
for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from core.cli import schema
from core.cli.manual import manual
from core.compose.hooks import OPTIONAL, Registry, load_registry
from core.policy import ROLES
from headway import ConfigError, Order

CONF = Path(__file__).resolve().parent.parent / "conf"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def sections(text: str) -> dict[str, str]:
    return {
        section.partition(":")[0]: section
        for section in text.split("\n\n")
        if not section.startswith((" ", "Headway", "`"))
    }


def test_every_option_of_every_group_is_there_with_its_one_line(registry):
    found = sections(manual([], registry))
    assert set(found) == {*ROLES, "policy", "experiment", "model", "hardware", "engine", "slo", "results"}
    for (role, name), plugin in registry.plugins.items():
        assert f"\n  {name:<17}{plugin.summary[:40]}" in found[role]
    for file in CONF.glob("*/*.yaml"):
        assert f"\n  {file.stem} " in found[file.parent.name]
    assert all("\n  none " in found[role] for role in OPTIONAL)


def test_every_parameter_is_there_as_it_would_be_typed(registry):
    found = sections(manual([], registry))
    for (role, _), plugin in registry.plugins.items():
        assert all(f" {role}.{f.name}=" in found[role] for f in plugin.parameters())
    for node, config in schema.NODES.items():
        assert all(f" {node}.{name}=" in found[node] for name in config.__dataclass_fields__)
    assert (
        "engine.num_blocks=null" in found["engine"]
        and "int; 1 to 65536, tokens; of a KV block" in found["engine"]
    )
    assert "order.weights={}" in found["order"] and "executor.path=''" in found["executor"]


def test_a_policy_says_what_it_chooses(registry):
    said = " ".join(sections(manual([], registry))["policy"].split())
    assert "[scheduler=prefill_first order=vtc admission=peak_memory cache=none]" in said


@pytest.mark.parametrize(
    ("asked", "groups", "there", "absent"),
    [
        (["cache"], {"cache"}, "radix", "vtc"),
        (["results"], {"results"}, "\n  summary ", "vtc"),
        (["model"], {"model"}, "\n  tiny ", "vtc"),
        (["order=vtc,fcfs"], {"order"}, "order.wq", "mlfq"),
        (["lru"], {"eviction"}, "lru", "sieve"),
        (["vtc"], {"order", "policy"}, "order.wp", "niyama"),
        (
            ["scheduler.token_budget=3", "engine", "-m", "hydra.verbose=true"],
            {"scheduler", "engine"},
            "engine.block_size",
            "radix",
        ),
    ],
)
def test_what_is_asked_for_is_shown_alone(registry, asked, groups, there, absent):
    shown = manual(asked, registry)
    assert set(sections(shown)) == groups
    assert there in shown and absent not in shown


def test_what_there_is_not_is_answered_with_the_near_names(registry):
    with pytest.raises(
        ConfigError, match="--help cach: there is no such group or option. Did you mean cache"
    ):
        manual(["cach"], registry)


@dataclass
class Inherits(Order):
    """Parameters of a base class keep their comments."""

    first: int = 1  # comes from below

    def order(self, view):
        return view.waiting


@dataclass
class Inherited(Inherits):
    """Has one more."""

    second: float = 0.5  # has its own


def test_comments_are_found_along_the_classes():
    registry = Registry()
    registry.add("order", "inherited", Inherited)
    shown = manual(["order=inherited"], registry)
    assert "order.first=1" in shown and "int; comes from below" in shown
    assert "order.second=0.5" in shown and "float; has its own" in shown
