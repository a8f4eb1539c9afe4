"""Former names of roles. They are read wherever a role is named from outside: command lines, configs and
results of earlier runs, registrations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from .errors import ConfigError

FORMER_NAMES = {"budget": "chunk"}

_KEY = re.compile(r"^([+~]*)(\w+)")
V = TypeVar("V")


def renamed(text: str) -> str:
    """A role's name, a key that begins with it or an override of such a key, with today's name:
    `budget.chunk_size=64` is `chunk.chunk_size=64`."""
    return _KEY.sub(lambda found: found[1] + FORMER_NAMES.get(found[2], found[2]), text, count=1)


def with_names_of_today(entries: Mapping[str, V]) -> dict[str, V]:
    """A mapping by roles or by keys that begin with them. Raises ConfigError where one is there under both of
    its names."""
    found: dict[str, V] = {}
    for key, value in entries.items():
        if (name := renamed(key)) != key and name in entries:
            raise ConfigError(
                f"{key} and {name} are both given, and {key} is the former name of {name}: leave it out"
            )
        found[name] = value
    return found
