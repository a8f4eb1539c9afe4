"""`python run.py --help`: every group, its options and their parameters, from the registry and from conf/.
Nothing is composed."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..compose.defaults import CONF
from ..compose.hooks import OPTIONAL, Plugin, Registry
from ..compose.params import describe, limits_of
from ..errors import ConfigError, near
from ..policy import ROLES
from ..renamed import renamed
from . import schema
from .explain import complain

#: Groups that are no role -> what they say. A role's question is in core/policy.py.
TOPICS = {
    "policy": "a paper's policy: sets every role that it fills",
    "experiment": "a study: choices and parameters together",
    "model": "what is served: a preset, a path or a hub id (model=PATH, model=OWNER/NAME)",
    "hardware": "one accelerator and its links, for executor=sim",
    "engine": "the engine's own limits",
    "slo": "latency targets of requests that bring none",
    "results": "what does a run leave in its directory?",
}
EXAMPLES = """\
Headway: LLM-inference scheduling and KV-caching policies, on a real engine and in a simulator.

  python run.py                                                    a tiny model on this machine
  python run.py scheduler=chunked cache=radix parallel.tp=4        choose a policy per role
  python run.py scheduler=chunked scheduler.token_budget=256       and its parameters
  python run.py order=vtc order.weights={c0:2}                     a parameter that holds entries
  python run.py executor=sim model=qwen3_8b hardware=h200          the same decisions in virtual time
  python run.py model=<path or hub id>                             a checkpoint of your own
  python run.py -m scheduler=fcfs,chunked,pd_split cache=none,hash,radix   a sweep, with one table at the end
  python run.py -cp DIR/.hydra -cn config seed=1                   an earlier run again, with a change
  python run.py --help order cache=radix                           this, for a group or an option
  python -m headway plugins                            where each plugin comes from, and what is broken

`seed=1` is the seed of every draw. `python run.py --cfg job ...` prints a composition, `--hydra-help`
Hydra's own flags.
"""


@dataclass(frozen=True)
class Option:
    """One choice of a group, and the dataclass whose fields it sets."""

    name: str
    summary: str
    config: type | None = None


def show(arguments: Sequence[str], registry: Registry) -> int:
    """Prints the manual, or what it says of the groups and options among the arguments, by pages on a
    terminal; the exit code."""
    try:
        pydoc.pager(manual(arguments, registry))
    except ConfigError as error:
        complain(error)
        return 2
    return 0


def manual(arguments: Sequence[str], registry: Registry) -> str:
    """Arguments that are no flag pick what is shown: `order`, `order=vtc`, `vtc`, `scheduler.token_budget=3`.

    Raises ConfigError for one that picks nothing.
    """
    groups = {name: list(_options(name, registry)) for name in (*ROLES, *TOPICS)}
    wanted = [
        renamed(a.lstrip("+~")) for a in arguments if not a.startswith("-") and not a.startswith("hydra.")
    ]
    picked: dict[str, list[Option]] = {}
    for argument in wanted:
        for name, options in _picked(argument, groups).items():
            picked.setdefault(name, []).extend(o for o in options if o not in picked.get(name, []))
    sections = [_section(name, options) for name, options in (picked or groups).items()]
    return "\n\n".join(sections if wanted else [EXAMPLES.rstrip(), *sections]) + "\n"


def _picked(argument: str, groups: dict[str, list[Option]]) -> dict[str, list[Option]]:
    key, _, value = argument.partition("=")
    head = key.partition(".")[0]
    if head in groups:
        names = value.split(",") if value else []
        chosen = [o for o in groups[head] if o.name in names]
        return {head: chosen or groups[head]}
    found = {name: [o for o in options if o.name == key] for name, options in groups.items()}
    if any(found.values()):
        return {name: options for name, options in found.items() if options}
    known = [*groups, *(o.name for options in groups.values() for o in options)]
    raise ConfigError(f"--help {argument}: there is no such group or option.{near(head, known)}")


# ---- what there is ---------------------------------------------------------------------------------------


def _options(group: str, registry: Registry) -> Iterator[Option]:
    node, names = schema.NODES.get(group), registry.names(group)
    for name in names:
        plugin: Plugin = registry.plugins[group, name]
        yield Option(name, plugin.summary, plugin.config)
    if group in OPTIONAL:
        yield Option("none", "without one")
    if group in ("parallel", "engine", "slo", "results") and not names:
        yield Option("", "", node)
    for file in sorted((CONF / group).glob("*.yaml")):
        yield Option(file.stem, _about(file))
    if group in ("model", "hardware"):
        yield Option("", f"parameters of every {group}", node)


def _about(file: Path) -> str:
    """The comment that a file begins with, and for a policy what it chooses; else what it names."""
    text = file.read_text(encoding="utf-8")
    comment = " ".join(
        line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line
    )
    chooses = " ".join(f"{role}={name}" for role, name in re.findall(r"override /(\w+): (\w+)", text))
    named = re.search(r"^name_or_path: (.+)$", text, re.MULTILINE)
    return " ".join(
        filter(None, (comment or (named.group(1) if named else ""), f"[{chooses}]" if chooses else ""))
    )


# ---- how it is shown -------------------------------------------------------------------------------------


def _section(group: str, options: Sequence[Option]) -> str:
    lines = [f"{group}: {ROLES.get(group) or TOPICS[group]}"]
    for option in options:
        if option.name:
            lines += _wrapped(option.name, option.summary, indent=2, width=16)
        elif option.summary:
            lines.append(f"  {option.summary}:")
        for parameter in fields(option.config) if option.config else ():
            if parameter.init:
                lines += _parameter(group, parameter, option.config)
    return "\n".join(lines)


def _parameter(group: str, parameter: Field[Any], owner: type | None) -> list[str]:
    declared = f"{group}.{parameter.name}={_default(parameter)}"
    type_name = (
        parameter.type
        if isinstance(parameter.type, str)
        else getattr(parameter.type, "__name__", str(parameter.type))
    )
    comment = _comments(owner).get(parameter.name, "") if owner else ""
    about = "; ".join(filter(None, (type_name, describe(parameter), limits_of(parameter).doc, comment)))
    return _wrapped(declared, about, indent=6, width=38)


def _default(parameter: Field[Any]) -> str:
    """As it would be typed."""
    value = parameter.default_factory() if parameter.default_factory is not MISSING else parameter.default
    if value is MISSING:
        return "(required)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "''" if value == "" else str(value).replace("'", "").replace(": ", ":").replace(", ", ",")


def _wrapped(name: str, text: str, indent: int, width: int) -> list[str]:
    """`name` and `text` in two columns, as wide as the terminal."""
    columns = max(80, shutil.get_terminal_size((120, 40)).columns)
    start = " " * (indent + width + 1)
    label = " " * indent + name
    body = textwrap.wrap(text, columns - len(start), break_long_words=False) or [""]
    if len(label) >= len(start):
        return [label, *(start + line for line in body if line)]
    return [f"{label:<{len(start)}}{body[0]}".rstrip(), *(start + line for line in body[1:])]


def _comments(owner: type) -> dict[str, str]:
    """Field -> the comment behind it, of a dataclass and those that it derives from."""
    found: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if base.__module__ != "builtins":
            found |= _comments_of_file(inspect.getsourcefile(base) or "").get(base.__qualname__, {})
    return found


@cache
def _comments_of_file(path: str) -> dict[str, dict[str, str]]:
    """Class -> field -> comment."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    lines = text.splitlines()
    found: dict[str, dict[str, str]] = {}
    for made in tree.body:
        if isinstance(made, ast.ClassDef):
            declared = [
                f for f in made.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
            ]
            comments = {f.target.id: lines[f.end_lineno - 1][f.end_col_offset :] for f in declared}  # type: ignore[union-attr,operator]
            found[made.name] = {
                name: c.strip().removeprefix("#").strip() for name, c in comments.items() if "#" in c
            }
    return found
