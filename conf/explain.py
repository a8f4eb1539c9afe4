"""Errors in plain words: Hydra's and OmegaConf's messages with the near names, a traceback only for who asks for it."""

from __future__ import annotations

import os
import re
import sys
import traceback
from dataclasses import fields
from pathlib import Path

from core.errors import HeadwayError, near
from core.hooks import Registry
from core.policy import ROLES

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


def explain(error: BaseException, registry: Registry) -> str:
    """Hydra's message with the near names added, and the reason where a plugin that was asked for is broken."""
    text = _innermost(error)
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        role, name = match.groups()
        if role in ROLES and role not in schema.NODES:
            try:
                registry.get(role, name)
            except HeadwayError as better:
                return str(better)
        return f"{role}={name}: there is no such {role}.{near(name, options(role))}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match.group(1), registry)
    if match := re.search(r"Could not find config group '([^']+)'|No match in the defaults list.*?'([^']+)'", text):
        return _unknown_key(match.group(1) or match.group(2), registry)
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "object_type" not in line)


def _innermost(error: BaseException) -> str:
    """The message of the error and of what caused it, since Hydra wraps OmegaConf's."""
    said = str(error)
    cause = error.__cause__
    return f"{said}\n{cause}" if cause is not None and str(cause) not in said and "\n" not in said.strip() else said


def options(group: str) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra

    if not GlobalHydra.instance().is_initialized():
        return sorted(p.stem for p in (Path(__file__).parent / group).glob("*.yaml"))
    return GlobalHydra.instance().config_loader().get_group_options(group)


def _unknown_key(key: str, registry: Registry) -> str:
    head, _, rest = key.partition(".")
    groups = [*schema.NODES, *schema.GROUP_ROLES, "policy", "experiment", "seed"]
    if head not in groups:
        return f"{key}: there is no such key.{near(head, groups)} `python run.py --help` shows them all"
    chosen = {a.partition("=")[0]: a.partition("=")[2] for a in sys.argv[1:]}.get(head)
    if head in schema.NODES:
        known = [f.name for f in fields(schema.NODES[head])]
        return f"{key}: {head} has no such parameter.{near(rest, known)}"
    if chosen is None:
        known = sorted({f.name for (role, _), p in registry.plugins.items() if role == head for f in p.parameters()})
        return f"{key}: the chosen {head} has no such parameter.{near(rest, known)}"
    known = [f.name for f in registry.get(head, chosen).parameters()]
    return f"{key}: {head}={chosen} has no such parameter.{near(rest, known)}"
