"""The default policies as objects, for tests that build an engine by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

from core.compose.build import build_roles
from core.compose.defaults import default_choices
from core.compose.hooks import Registry, load_registry


@cache
def registry() -> Registry:
    return load_registry()


def default_roles(**objects: Any) -> dict[str, Any]:
    """New objects of the default composition, with these in the place of theirs."""
    return build_roles(registry(), default_choices())[0] | objects
