"""Discovery and the registry: what is found, what is refused and why, and that a broken plugin stops only who
asks for it."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from core.compose.hooks import BLOCK, OPTIONAL, HeadwaySpec, Origin, Registry, load_registry
from core.policy import ROLES
from headway import ConfigError, KeyEviction, Observer, Order, PluginError, Scheduler, hookimpl


@dataclass
class ByIndex(Order):
    """By index.

    More words that no listing shows.
    """

    alpha: float = 0.5

    def order(self, view):
        return view.waiting


def module(name: str, **members: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


def installed(folder: Path, dist: str, entry: str, source: str) -> None:
    """An installed distribution, as pip would leave it, with one entry point of the group `headway`."""
    (folder / f"{dist}_plugin.py").write_text(source)
    sys.modules.pop(f"{dist}_plugin", None)  # of another test
    info = folder / f"{dist}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[headway]\n{entry} = {dist}_plugin\n")


GOOD = """
from dataclasses import dataclass
from headway import Order, hookimpl

@dataclass
class Mine(Order):
    '''Mine first.'''
    beta: int = 3
    def order(self, view):
        return view.waiting

@hookimpl
def headway_register(registry):
    registry.add("order", "NAME", Mine)
"""


def test_in_tree_plugins_are_found_and_none_is_broken():
    registry = load_registry()
    assert not [b for b in registry.broken if not b.origin.dist]
    assert {"fcfs", "chunked", "pd_split"} <= set(registry.names("scheduler"))
    assert {"none", "hash", "radix"} <= set(registry.names("cache"))
    assert {"torch", "sim", "replay"} <= set(registry.names("executor"))
    assert all(p.summary and not p.summary.endswith("\n") for p in registry.plugins.values())
    assert all(Path(p.origin.source).is_file() for p in registry.plugins.values() if not p.origin.dist)


def test_core_and_the_registry_import_nothing_heavy_and_take_little_time():
    code = (
        "import sys, time; t = time.process_time(); import core.engine, headway; done = time.process_time() "
        "- t\n"
        "from core.compose.hooks import load_registry; load_registry()\n"
        "heavy = sorted({'torch', 'triton', 'transformers', 'hydra', 'omegaconf', 'wandb', 'pyarrow', "
        "'numpy'} & set(sys.modules))\n"
        "print(f'{done} {heavy}')"
    )
    spent, _, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.partition(" ")
    assert heavy.strip() == "[]"
    assert float(spent) < 0.5


@pytest.mark.parametrize("name", ["fcfs", "chunked", "pd_split"])
def test_a_scheduler_of_a_paper_stays_short(name):
    """Mechanism belongs to StepBuilder: what is left of a policy is its paper. Parameters and their checks
    are not counted."""
    methods = [
        n
        for n in ast.walk(ast.parse(inspect.getsource(load_registry().get("scheduler", name).factory)))
        if isinstance(n, ast.FunctionDef)
    ]
    assert 0 < sum(m.end_lineno - m.lineno + 1 for m in methods if m.name != "setup") <= 30


def test_a_plugin_is_its_dataclass():
    registry = Registry()
    registry.add("order", "mine", ByIndex)
    plugin = registry.get("order", "mine")
    assert plugin.summary == "By index."
    assert [(f.name, f.default) for f in plugin.parameters()] == [("alpha", 0.5)]
    assert plugin.build(alpha=2.0).alpha == 2.0


def test_a_function_with_a_config_dataclass_is_a_factory():
    @dataclass
    class Settings:
        alpha: float = 1.0

    def make(settings: Settings) -> Order:
        """Made by a function."""
        return ByIndex(settings.alpha * 2)

    registry = Registry()
    registry.add("order", "made", make, Settings)
    assert registry.get("order", "made").build(alpha=4.0).alpha == 8.0
    assert registry.get("order", "made").summary == "Made by a function."


def test_an_unknown_name_is_answered_with_the_near_ones():
    registry = Registry()
    registry.add("order", "shortest", ByIndex)
    with pytest.raises(ConfigError, match="order=shortst: there is no such order. Did you mean shortest?"):
        registry.get("order", "shortst")
    with pytest.raises(ConfigError, match="no role 'ordr'. Did you mean order"):
        registry.get("ordr", "x")


@dataclass
class NoMethod(Scheduler):
    pass


@dataclass
class NoKey(KeyEviction):
    pass


class NoDataclass(Order):
    def order(self, view):
        return view.waiting


@dataclass
class FromTheFuture(ByIndex):
    api = 99


@dataclass
class Named(ByIndex):
    name: str = ""


@pytest.mark.parametrize(
    ("role", "name", "factory", "reason"),
    [
        ("order", "mine", NoDataclass, "put @dataclass above class NoDataclass"),
        ("scheduler", "mine", NoMethod, r"NoMethod lacks plan\(\)"),
        ("eviction", "mine", NoKey, r"NoKey lacks key\(\)"),
        ("victim", "mine", ByIndex, "ByIndex is no Victim: derive it from headway.Victim"),
        ("order", "mine", FromTheFuture, "needs plugin API 99, this Headway has 1: update Headway"),
        ("order", "mine", Named, "may not be called 'name'"),
        ("order", "mine", lambda config: None, "needs the dataclass of its parameters"),
        ("ordr", "mine", ByIndex, "no role 'ordr'. Did you mean order"),
        ("order", "a b", ByIndex, "cannot be chosen on a command line"),
        ("chunk", "none", ByIndex, "cannot be chosen on a command line"),
    ],
)
def test_what_cannot_work_is_refused_with_file_and_mend(role, name, factory, reason):
    registry = Registry()
    registry._origin = Origin("mypaper", "mypaper.plugin", "my-paper", "0.3")
    with pytest.raises(PluginError, match=reason) as caught:
        registry.add(role, name, factory)
    assert "my-paper 0.3" in str(caught.value)
    assert "test_hooks.py:" in str(caught.value)
    with pytest.raises((PluginError, ConfigError)):
        registry.get(role, name)


def test_a_taken_name_is_an_error_that_names_both_origins():
    def register(registry):
        registry.add("order", "mine", ByIndex)

    registry = Registry()
    registry.register(
        module("a", headway_register=hookimpl(register)), Origin("first", "first.py", "package-a", "1.0")
    )
    registry.register(
        module("b", headway_register=hookimpl(register)), Origin("second", "second.py", "package-b", "2.0")
    )
    with pytest.raises(
        PluginError,
        match=r"order=mine is registered twice, by package-a 1.0 \(first.py\) "
        r"and by package-b 2.0 \(second.py\)",
    ):
        registry.get("order", "mine")


def test_what_a_hook_gets_wrong_is_recorded_with_the_reason():
    def wrong_arguments(registre):
        pass

    def raises(registry):
        raise RuntimeError("no luck")

    registry = Registry()
    registry.register(module("a", headway_register=hookimpl(wrong_arguments)), Origin("a", "a.py"))
    registry.register(module("b", headway_observer=hookimpl(lambda run: [])), Origin("b", "b.py"))
    registry.register(module("c", headway_register=hookimpl(raises)), Origin("c", "c.py"))
    reasons = {b.origin.name: b.reason for b in registry.broken}
    assert "registre" in reasons["a"]
    assert "unknown hook headway_observer. Did you mean headway_observers" in reasons["b"]
    assert reasons["c"] == "RuntimeError: no luck"


def test_installed_packages_are_available_and_a_broken_one_stops_only_who_asks(tmp_path, monkeypatch):
    installed(tmp_path, "goodpaper", "goodpaper", GOOD.replace("NAME", "mine"))
    installed(tmp_path, "badpaper", "badpaper", "import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_registry()
    plugin = registry.get("order", "mine")
    assert (plugin.origin.dist, plugin.origin.version) == ("goodpaper", "1.2")
    assert registry.get("order", "fcfs")
    with pytest.raises(
        PluginError,
        match="order=badpaper cannot be used: import failed: ModuleNotFoundError: "
        ".*a_module_that_is_not_there",
    ):
        registry.get("order", "badpaper")


@pytest.mark.parametrize(
    ("field", "source"),
    [
        ("beta: int = field(default_factory=lambda: 1 / 0)", "from dataclasses import field"),
        (
            "beta: int = field(default_factory=lambda: sys.exit(3))",
            "import sys; from dataclasses import field",
        ),
    ],
)
def test_a_default_that_cannot_be_made_is_listed_and_stops_only_who_asks(
    tmp_path, monkeypatch, field, source
):
    broken = f"{source}\n{GOOD.replace('NAME', 'mine').replace('beta: int = 3', field)}"
    installed(tmp_path, "badpaper", "badpaper", broken)
    installed(tmp_path, "goodpaper", "goodpaper", GOOD.replace("NAME", "other"))
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_registry()
    assert registry.get("order", "other").build().beta == 3
    with pytest.raises(
        PluginError, match="the default of its parameter beta cannot be made: (ZeroDivisionError|SystemExit)"
    ):
        registry.get("order", "mine")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    listed = subprocess.run(
        [sys.executable, "-m", "headway", "plugins", "order"], capture_output=True, text=True, check=True
    ).stdout
    assert "other" in listed and "parameter beta cannot be made" in listed


@pytest.mark.parametrize(
    "leave", ["raise SystemExit(0)", "import sys; sys.exit('no')", "raise RuntimeError('no luck')"]
)
def test_a_package_that_leaves_while_it_registers_is_listed_and_hurts_nobody(tmp_path, monkeypatch, leave):
    rude = "from headway import hookimpl\n@hookimpl\ndef headway_register(registry):\n    " + leave
    installed(tmp_path, "badpaper", "badpaper", rude)
    installed(tmp_path, "goodpaper", "goodpaper", GOOD.replace("NAME", "mine"))
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_registry()
    assert registry.get("order", "mine") and registry.get("order", "fcfs")
    assert [b.origin.dist for b in registry.broken] == ["badpaper"]
    assert leave.partition("(")[0].split()[-1].replace("sys.exit", "SystemExit") in registry.broken[0].reason


def test_two_packages_with_one_name_are_both_named_and_neither_is_used(tmp_path, monkeypatch):
    installed(tmp_path, "first_paper", "paper", GOOD.replace("NAME", "one"))
    installed(tmp_path, "second_paper", "paper", GOOD.replace("NAME", "two"))
    installed(tmp_path, "goodpaper", "goodpaper", GOOD.replace("NAME", "mine"))
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_registry()
    assert registry.get("order", "mine") and not {"one", "two"} & set(registry.names("order"))
    assert sorted(b.origin.dist for b in registry.broken) == ["first_paper", "second_paper"]
    for broken in registry.broken:
        assert (
            "first_paper 1.2 (first_paper_plugin) and second_paper 1.2 (second_paper_plugin) are both called "
            "paper" in broken.reason
        )
    with pytest.raises(PluginError, match="both called paper"):
        registry.get("order", "paper")
    monkeypatch.setenv(BLOCK, "second_paper")
    assert "one" in load_registry().names("order")


def test_a_name_that_is_taken_in_tree_is_said_with_both(tmp_path, monkeypatch):
    installed(tmp_path, "badpaper", "schedulers.order.fcfs", GOOD.replace("NAME", "mine"))
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_registry()
    (broken,) = registry.broken
    assert "badpaper 1.2" in broken.reason and "plugins/schedulers/order/fcfs.py" in broken.reason


@pytest.mark.parametrize("blocked", ["goodpaper", "*", "other, goodpaper"])
def test_the_environment_can_leave_plugins_out(tmp_path, monkeypatch, blocked):
    installed(tmp_path, "goodpaper", "goodpaper", GOOD.replace("NAME", "mine"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(BLOCK, blocked)
    registry = load_registry()
    assert "mine" not in registry.names("order")
    assert "fcfs" in registry.names("order")


def test_observers_come_from_every_hook_in_the_order_of_registration():
    one, two = Observer(), Observer()
    registry = Registry()
    registry.register(module("a", headway_observers=hookimpl(lambda run: [one])), Origin("a", "a.py"))
    registry.register(module("b", headway_observers=hookimpl(lambda run: [two])), Origin("b", "b.py"))
    assert registry.observers(run=None) == [one, two]


def test_every_hook_has_a_docstring_and_every_optional_role_exists():
    assert all(
        function.__doc__ for name, function in vars(HeadwaySpec).items() if name.startswith("headway_")
    )
    assert set(OPTIONAL) <= set(ROLES)


def test_the_command_lists_plugins_with_parameters_and_origin_and_what_is_broken(tmp_path, monkeypatch):
    installed(tmp_path, "goodpaper", "goodpaper", GOOD.replace("NAME", "mine"))
    installed(tmp_path, "badpaper", "badpaper", "import a_module_that_is_not_there")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    listed = subprocess.run(
        [sys.executable, "-m", "headway", "plugins", "order", "--json"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    data = json.loads(listed)
    mine = next(p for p in data["plugins"] if p["name"] == "mine")
    assert mine["parameters"] == [{"name": "beta", "type": "int", "default": 3}]
    assert (mine["dist"], mine["version"], mine["summary"]) == ("goodpaper", "1.2", "Mine first.")
    assert {p["role"] for p in data["plugins"]} == {"order"}
    assert "a_module_that_is_not_there" in next(
        b["reason"] for b in data["broken"] if b["name"] == "badpaper"
    )
    text = subprocess.run(
        [sys.executable, "-m", "headway", "plugins"], capture_output=True, text=True, check=True
    ).stdout
    assert "Mine first." in text and "goodpaper 1.2" in text and "broken:" in text
    assert "Not here: its mixed chunks" in text  # what sglang is not
