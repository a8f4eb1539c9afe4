"""Renders chat templates in a process of its own: a template is a program of a stranger, and only from
outside can it be stopped.

Started by path, so that neither Headway nor torch is imported here. One JSON object per line comes in
({"template", "variables", "seconds"}) and one goes out ({"text"}, or {"error", "line"}). A template that
takes more CPU time than that, or too much memory, ends the process. What a template finds is what
transformers 5 gives it: the same sandbox, filters, globals and tags.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of this process
LONGEST = 1 << 26  # characters of one conversation, as messages and as text
OUT_OF_MEMORY = 3  # exit code


class Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here its body is rendered and nothing
    else."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


class Dicts:
    """`dict` of a template: an instance, whose class cannot be reached."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """Refuses names that begin with an underscore, which would reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no name for the object: templates may say self=...
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter: nothing is escaped for HTML and keys keep their order."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": Dicts(),
        "namespace": Namespace,
    }
    return environment.from_string(source)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        text = compiled(asked["template"]).render(**asked["variables"])
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is no Jinja template: {error.message}", "line": error.lineno}
    except jinja2.TemplateError as error:
        kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
        return {"error": f"refuses these messages: {kind}{error}", "line": _line(error)}
    except Exception as error:
        return {"error": f"fails on these messages: {type(error).__name__}: {error}", "line": _line(error)}
    if len(text) > LONGEST:
        return {"error": f"renders {len(text):,} characters, more than {LONGEST:,}", "line": 0}
    return {"text": text}


def _line(error: Exception) -> int:
    """Of the template, where the error was raised; 0 where that is not known."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or 0 for frame in reversed(frames) if frame.filename == "<template>"), 0)


def main() -> None:
    with suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while line := sys.stdin.readline():
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])  # its signal ends the process
        text = json.dumps(answer(asked))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
