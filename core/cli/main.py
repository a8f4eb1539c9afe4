"""`python -m headway plugins|check|new|trace|whatif`: what is there, does it keep the rules, start a package,
look into a trace, a recorded run with other policies."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field
from importlib import import_module
from typing import Any

from ..compose.hooks import Plugin, Registry, load_registry
from ..compose.params import describe, limits_of
from ..errors import HeadwayError, near
from ..policy import ROLES
from ..renamed import renamed

#: Verb -> (module, its function of argv that answers the exit code, one line). Imported only when it is asked
#: for.
VERBS = {
    "plugins": (
        "core.cli.main",
        "plugins",
        "list every available plugin, its parameters and where it comes from",
    ),
    "check": (
        "core.cli.presets",
        "check",
        "run the conformance kit on a composition: check policy=vtc, check order=mypaper",
    ),
    "new": ("core.cli.scaffold", "main", "write an installable plugin package: new order mypaper"),
    "trace": ("core.cli.tracing", "trace", "measure a trace file: rates, lengths, prefix reuse"),
    "whatif": (
        "core.cli.whatif",
        "whatif",
        "a recorded run again with other policies: whatif RUN order=srpt,vtc",
    ),
}


def main(argv: list[str]) -> int:
    """Exit code of a verb; 2 for an unknown one or an error in what was given."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: python -m headway VERB [...]\n\n"
            + "\n".join(f"  {verb:<8} {line}" for verb, (_, _, line) in VERBS.items())
        )
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        print(f"error: there is no verb {verb!r}.{near(verb, VERBS)}", file=sys.stderr)
        return 2
    module, name, _ = VERBS[verb]
    function: Callable[[list[str]], int] = getattr(import_module(module), name)
    try:
        code = function(rest)
        sys.stdout.flush()
    except HeadwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head` has seen enough; what is still in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


# ---- plugins ---------------------------------------------------------------------------------------------


def plugins(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m headway plugins", description="Every available plugin, and what is broken."
    )
    parser.add_argument("role", nargs="?", type=renamed, help=f"only this role: {', '.join(ROLES)}")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    options = parser.parse_args(argv)
    if options.role and options.role not in ROLES:
        parser.error(f"there is no role {options.role!r}.{near(options.role, ROLES)}")
    registry = load_registry()
    chosen = [
        registry.plugins[role, name]
        for role in ROLES
        if options.role in (None, role)
        for name in registry.names(role)
    ]
    print(_as_json(chosen, registry) if options.json else _as_text(chosen, registry))
    return 0


def _as_json(chosen: list[Plugin], registry: Registry) -> str:
    found = [
        {
            "role": p.role,
            "name": p.name,
            "summary": p.summary,
            "differs": p.differs,
            "origin": p.origin.source,
            "dist": p.origin.dist,
            "version": p.origin.version,
            "parameters": [_parameter(f) for f in p.parameters()],
        }
        for p in chosen
    ]
    broken = [
        {
            "name": b.origin.name,
            "origin": str(b.origin),
            "role": b.role,
            "choice": b.choice,
            "reason": b.reason,
        }
        for b in registry.broken
    ]
    return json.dumps({"plugins": found, "broken": broken}, indent=2, default=str)


def _as_text(chosen: list[Plugin], registry: Registry) -> str:
    lines: list[str] = []
    role = ""
    for p in chosen:
        if p.role != role:
            role = p.role
            lines.append(f"\n{role}: {ROLES[role]}")
        lines.append(f"  {p.name:<14} {p.summary}")
        if p.differs:
            lines.append(f"  {'':<14} {p.differs}")
        lines += [f"  {'':<14} {f.name}: {_type(f)} = {_default(f)!r}{_range(f)}" for f in p.parameters()]
        lines.append(f"  {'':<14} from {p.origin}")
    if registry.broken:
        lines.append("\nbroken:")
        lines += [f"  {b.origin.name} ({b.origin})\n    {b.reason}" for b in registry.broken]
    return "\n".join(lines).lstrip("\n")


def _parameter(parameter: Field[Any]) -> dict[str, Any]:
    known = {"name": parameter.name, "type": _type(parameter), "default": _default(parameter)}
    said = {"range": describe(parameter), "doc": limits_of(parameter).doc}
    return known | {key: text for key, text in said.items() if text}


def _range(parameter: Field[Any]) -> str:
    text = describe(parameter)
    return f" ({text})" if text else ""


def _type(parameter: Field[Any]) -> str:
    return (
        parameter.type
        if isinstance(parameter.type, str)
        else getattr(parameter.type, "__name__", str(parameter.type))
    )


def _default(parameter: Field[Any]) -> Any:
    if parameter.default_factory is not MISSING:
        return parameter.default_factory()
    return "required" if parameter.default is MISSING else parameter.default
