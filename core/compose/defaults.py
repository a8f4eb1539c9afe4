"""The composition that every other one starts from: what `conf/config.yaml` composes, read from there, since
it is written nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..policy import ROLES
from .hooks import OPTIONAL

CONF = Path(__file__).resolve().parents[2] / "conf"  # Hydra's groups
#: Roles without which no engine plans a step.
PLANNING = ("scheduler", "order", "victim", "cache", "eviction")

Choices = dict[str, tuple[str, dict[str, Any]]]  # role -> (plugin, its parameters)


@cache
def default_names() -> Mapping[str, str]:
    """Role -> the plugin that `python run.py` composes; optional roles that it leaves out are absent."""
    import yaml

    entries = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    chosen = {role: name for entry in entries if isinstance(entry, dict) for role, name in entry.items()}
    return MappingProxyType(
        {
            role: name
            for role, name in chosen.items()
            if role in ROLES and (name != "none" or role not in OPTIONAL)
        }
    )


def default_choices(**changes: str | tuple[str, dict[str, Any]]) -> Choices:
    """The default policies with some of them changed, and other roles added: order="vtc", or order=("vtc",
    {"wq": 4.0})."""
    names = {role: default_names()[role] for role in PLANNING}
    return {
        role: (choice, {}) if isinstance(choice, str) else choice
        for role, choice in (names | changes).items()
    }
