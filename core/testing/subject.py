"""What is tested: the policies a user named, and the choices that fill every other role."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .. import policy
from ..compose.build import build_roles
from ..compose.config import EngineConfig
from ..compose.defaults import Choices, default_choices
from ..compose.hooks import OPTIONAL, Origin, Registry, load_registry
from ..engine import Engine
from ..errors import ConfigError, near
from ..policy import Role
from ..renamed import renamed
from . import erratic
from .case import Case, random_case
from .oracle import OracleExecutor

#: Roles that a case fills when nobody named them: choices of (plugin, parameter -> values). "none" leaves an
#: optional role out.
RANDOM_ROLES: dict[str, list[tuple[str, dict[str, list[Any]]]]] = {
    "scheduler": [
        ("chunked", {"token_budget": [None, 3, 8], "chunk_size": [None, 1, 2, 7]}),
        ("chunked", {"token_budget": [None, 3, 8], "chunk_size": [None, 1, 2, 7]}),
        ("fcfs", {}),
        ("pd_split", {"switch_waiting": [1, 3]}),
        ("erratic", {}),
    ],
    "order": [("fcfs", {}), ("fcfs", {}), ("erratic", {})],
    "victim": [
        ("newest", {"mode": list(policy.PREEMPTION_MODES)}),
        ("erratic", {"mode": list(policy.PREEMPTION_MODES)}),
    ],
    "cache": [("hash", {}), ("radix", {}), ("hash", {}), ("radix", {}), ("none", {})],
    "eviction": [("lru", {}), ("fifo", {}), ("lfu", {}), ("erratic", {})],
    "retention": [("none", {}), ("none", {}), ("erratic", {})],
    "admission": [("none", {}), ("none", {}), ("none", {}), ("erratic", {})],
    "chunk": [("none", {}), ("none", {}), ("none", {}), ("erratic", {})],
    "predictor": [("erratic", {}), ("declared", {})],
}
#: The plain choice for each of them, where a check compares or measures.
PLAIN: Choices = default_choices(predictor="declared")


@dataclass
class Subject:
    """A composition to check, as `role=name role.parameter=value` words; modules are plugin files that are
    not installed."""

    words: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    registry: Registry = field(init=False)
    choices: Choices = field(init=False)

    def __post_init__(self) -> None:
        self.registry = kit_registry(self.modules)
        self.choices = _parse(self.words, self.registry)

    def case(self, seed: int) -> Case:
        random_roles = {role: choices for role, choices in RANDOM_ROLES.items() if role not in self.choices}
        return random_case(seed, random_roles)

    def roles(self, case: Case) -> dict[str, Role]:
        """New objects for one run of the case."""
        filled = {role: (name, dict(parameters)) for role, name, parameters in case.fill}
        return self._build({**filled, **self.choices})

    def plain_roles(self) -> dict[str, Role]:
        """The named policies among plain ones."""
        return self._build(self.plain_choices())

    def plain_choices(self) -> Choices:
        return _present({**PLAIN, **self.choices})

    def refuse_what_cannot_be(self) -> None:
        """Raises ConfigError for a composition that no run would take; the words must name the roles that it
        depends on."""
        Engine({**self.plain_roles(), "executor": OracleExecutor()}, EngineConfig(4, 16))

    def _build(self, choices: Choices) -> dict[str, Role]:
        return build_roles(self.registry, _present(choices))[0]

    def classes(self) -> list[type[Role]]:
        """Of the policies that were named."""
        roles = self.plain_roles()
        return [type(roles[role]) for role in self.choices if role in roles]

    def __str__(self) -> str:
        return " ".join(self.words) or "the default composition"


def _present(choices: Choices) -> Choices:
    """Without the optional roles that are left out."""
    return {
        role: (name, parameters)
        for role, (name, parameters) in choices.items()
        if name != "none" or role not in OPTIONAL
    }


@cache
def kit_registry(modules: tuple[str, ...] = ()) -> Registry:
    """Everything available, the kit's own erratic policies, and plugin modules given by file or by name. Once
    per process."""
    registry = load_registry()
    erratic.add_to(registry)
    for name in modules:
        registry.register(_load(name), Origin(Path(name).stem, name))
    return registry


def _load(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--module {name}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _parse(words: Sequence[str], registry: Registry) -> Choices:
    chosen: Choices = {}
    for word in map(renamed, words):
        key, equals, text = word.partition("=")
        role, dot, parameter = key.partition(".")
        if not equals:
            raise ConfigError(f"{word!r}: expected role=name or role.parameter=value, such as order=sjf")
        if role not in RANDOM_ROLES:
            hint = " Name the roles that the preset sets." if role == "policy" else near(role, RANDOM_ROLES)
            raise ConfigError(
                f"{word!r}: the kit checks policies, and there is no policy role {role!r}.{hint}"
            )
        if dot:
            name = chosen.get(role, (PLAIN.get(role, ("", {}))[0], {}))[0]
            known = [f.name for f in registry.get(role, name).parameters()]
            if parameter not in known:
                raise ConfigError(
                    f"{word!r}: {role}={name} has no parameter {parameter!r}.{near(parameter, known)}"
                )
            chosen.setdefault(role, (name, {}))[1][parameter] = _value(text)
        elif role in chosen:
            raise ConfigError(
                f"{word!r}: {role}={chosen[role][0]} was given before it; name a role once, and before its "
                "parameters"
            )
        else:
            if text != "none" or role not in OPTIONAL:
                registry.get(role, text)  # refuses what is not there or broken
            chosen[role] = (text, {})
    return chosen


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
