"""Errors in plain words: Hydra's and OmegaConf's messages with the near names, a traceback only for who asks
for it."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.errors import OverrideParseException

from ..compose.hooks import Plugin, Registry
from ..errors import HeadwayError, near
from ..renamed import renamed
from . import schema
from .stored import hide

TRACEBACK = "HEADWAY_TRACEBACK"  # =1 shows the traceback behind an `error:` line


def shows_traceback() -> bool:
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def describe(error: BaseException) -> str:
    return hide(str(error) if isinstance(error, HeadwayError) else f"{type(error).__name__}: {error}")


def complain(error: BaseException) -> None:
    if shows_traceback():
        print(hide("".join(traceback.format_exception(error))), file=sys.stderr)
    hint = "" if isinstance(error, HeadwayError) or shows_traceback() else f" ({TRACEBACK}=1 shows where)"
    print(f"error: {describe(error)}{hint}", file=sys.stderr)


def explain(error: BaseException, registry: Registry, given: Sequence[str] | None = None) -> str:
    """One line that says what was given, what was expected and what to type. `given`: the overrides, else the
    command's."""
    chain = list(_causes(error))
    text = "\n".join(map(str, chain))
    told = Told(registry, sys.argv[1:] if given is None else given, text)
    for cause in chain:
        if isinstance(cause, OverrideParseException):
            return told.syntax(cause.override)
    for pattern, answer in PATTERNS:
        if match := re.search(pattern, text):
            return answer(told, *match.groups())
    return " ".join(
        line.strip() for line in str(error).splitlines() if line.strip() and "object_type" not in line
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, since Hydra wraps OmegaConf's errors and its parser's."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Told:
    """Answers about what was typed. `given`: the overrides; `text`: all that Hydra and OmegaConf said."""

    def __init__(self, registry: Registry, given: Iterable[str], text: str) -> None:
        self.registry, self.text = registry, text
        self.given = {key.lstrip("+~"): value for key, _, value in (g.partition("=") for g in given)}

    # ---- names --------------------------------------------------------------------------------------------

    def option(self, group: str, name: str) -> str:
        if group in schema.GROUP_ROLES:
            try:
                self.registry.get(group, name)
            except HeadwayError as better:
                return str(better)
        return f"{group}={name}: there is no such {group}.{near(name, schema.options(group))}"

    def key(self, key: str) -> str:
        head, _, rest = key.partition(".")
        groups = [*schema.NODES, *schema.GROUP_ROLES, "policy", "experiment", "seed"]
        if (name := renamed(key)) != key:
            return f"{key}: is called {name} now"
        if head not in groups:
            return f"{key}: there is no such key.{near(head, groups)} `python run.py --help` shows them all"
        if not rest:
            return self._value_for_group(head)
        owner, known = self._parameters(head)
        name = rest.partition(".")[0]
        entry = re.search(r"Key '(\w+)'", self.text)
        if name in known and entry and (parts := _parts(self._hint(head, name))):
            return f"{key}: {owner}'s {name} has no {entry[1]!r}.{near(entry[1], parts)}"
        if name in known:
            return (
                f"{key}: {owner}'s {name} has no such entry. To add it, type "
                f"+{key}={self.given.get(key, 'VALUE')}"
            )
        others = [
            f"{head}={p.name}" for p in self._plugins(head) if any(f.name == name for f in p.parameters())
        ]
        also = f" It is one of {', '.join(others)}." if others else ""
        return f"{key}: {owner} has no such parameter.{also or near(name, known)}"

    def _plugins(self, head: str) -> list[Plugin]:
        return [plugin for (role, _), plugin in self.registry.plugins.items() if role == head]

    def _parameters(self, head: str) -> tuple[str, list[str]]:
        """Whose parameters the keys under `head` are, and their names."""
        if head in schema.NODES:
            return head, [f.name for f in fields(schema.NODES[head])]
        if (plugin := self._chosen(head)) is not None:
            return f"{head}={plugin.name}", [f.name for f in plugin.parameters()]
        return f"the chosen {head}", sorted({f.name for p in self._plugins(head) for f in p.parameters()})

    def _chosen(self, head: str) -> Plugin | None:
        """The plugin that is typed for a role, else the one whose class OmegaConf names."""
        typed = self.registry.plugins.get((head, self.given.get(head, "")))
        named = re.search(r"not in '(\w+)'|object_type=(\w+)", self.text)
        classes = [p for p in self._plugins(head) if named and p.config.__name__ in named.groups()]
        return typed or (classes[0] if len(classes) == 1 else None)

    def _value_for_group(self, head: str) -> str:
        """`order=vtc` where the config has no list of choices: the config of a run that has been composed
        already."""
        where = f"{head}={value}" if (value := self.given.get(head, "")) else head
        if head in ("engine", "slo"):
            return (
                f"{where}: expected a parameter, {head}.NAME=VALUE. `python run.py --help {head}` shows them"
            )
        instead = (
            "To choose, "
            if head in ("policy", "experiment")
            else f"Set a parameter instead ({head}.NAME=VALUE), or "
        )
        return (
            f"{where}: this config is composed already, so there is nothing to choose. {instead}leave out "
            "-cp and -cn"
        )

    # ---- values -------------------------------------------------------------------------------------------

    def value(self, key: str) -> str:
        """A value of the wrong type; `key` may be that of an entry, like workload.rates[1]."""
        parameter = re.split(r"\[", key)[0]
        while parameter and parameter not in self.given:
            parameter = parameter.rpartition(".")[0]
        head, _, rest = (parameter or key).partition(".")
        name = re.split(r"[.\[]", rest)[0]
        hint = self._hint(head, name)
        value = self.given.get(parameter, "")
        if not name and head != "seed":
            return self._value_for_group(head)
        return schema.no_such_value(parameter or key, value, int if head == "seed" else hint)

    def merging(self, override: str) -> str:
        return self.value(override.partition("=")[0].lstrip("+~"))

    def _hint(self, head: str, name: str) -> Any:
        """The declared type of a parameter; None where the plugin that has it is not known."""
        if head in schema.NODES:
            owners: list[type] = [schema.NODES[head]]
        else:
            chosen = self._chosen(head)
            owners = [p.config for p in ([chosen] if chosen else self._plugins(head))]
        for owner in owners:
            if any(f.name == name for f in fields(owner)):
                return get_type_hints(owner).get(name)
        return None

    def group_key(self, key: str, *rest: str) -> str:
        return self.key(key.replace("/", "."), *rest)

    def syntax(self, typed: str) -> str:
        head, equals, _ = typed.partition("=")
        if not equals:
            return f"{typed}: expected KEY=VALUE, for example order=sjf or engine.block_size=32"
        return (
            f"{typed}: the value cannot be read. Quote what holds spaces, commas, braces, = or quotes: "
            f"\"{head}='...'\" "
            "with the outer quotes for the shell"
        )

    def several(self, override: str) -> str:
        key, _, values = override.partition("=")
        return (
            f"{override}: several values are a sweep, which needs -m. For one value that is a list, type "
            f"{key}=[{values}]"
        )

    def deleted(self, override: str) -> str:
        return (
            f"{override}: parameters cannot be removed. Leave it out for the default, or give another value"
        )

    def no_config(self, name: str) -> str:
        return f"-cn {name}: there is no {name}.yaml in the folder of -cp (conf/ where none is given)"


def _parts(hint: Any) -> list[str]:
    """Names of the fields of a dataclass that a type is made of; none for other types."""
    if isinstance(hint, type) and is_dataclass(hint):
        return [f.name for f in fields(hint)]
    return [name for argument in get_args(hint) for name in _parts(argument)]


#: How Hydra or OmegaConf says it -> what we say. The first that matches is used.
PATTERNS: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"Could not find '([\w/]+)/([^'/]*)'", Told.option),
    (r"Could not override '([^']+)'", Told.key),
    (
        r"Could not append to config\. An item is already at '([^']+)'",
        lambda told, key: f"+{key}: is there already. Type it without the +",
    ),
    (
        r"Could not find config group '([^']+)'|No match in the defaults list.*?'([^']+)'",
        lambda told, a, b: told.group_key(a or b),
    ),
    (r"Key '\w+' (?:is )?not in '\w+'[\s\S]*?full_key: (\S+)", Told.key),
    (r"Ambiguous value for argument '(\S+)'", Told.several),
    (r"Error merging override (~.+)\n", Told.deleted),
    (r"Error merging override (.+)\n", Told.merging),
    (r"full_key: ([a-z]\S+)", Told.value),
    (r"Cannot find primary config '([^']+)'", Told.no_config),
    (
        r"Primary config directory not found[\s\S]*?'([^']+)'",
        lambda told, path: f"-cp {path}: there is no such folder",
    ),
)
