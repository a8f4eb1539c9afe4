"""`policy=NAME` in words: what a paper's preset chooses, for those that take roles and not groups, as the
conformance kit does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from ..compose.defaults import CONF
from ..errors import ConfigError, near
from ..testing import check as kit

FOLDER = CONF / "policy"


def names() -> list[str]:
    """The presets that choose something."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "none")


def words(name: str) -> list[str]:
    """role=NAME of each role that the preset fills, and role.parameter=VALUE of what it sets."""
    content = _content(name)
    chosen: list[str] = []
    for entry in content.get("defaults", ()):
        ((group, choice),) = entry.items()
        role = group.removeprefix("override /")
        chosen += [
            f"{role}={choice}",
            *(f"{role}.{key}={value}" for key, value in content.get(role, {}).items()),
        ]
    return chosen


def about(name: str) -> str:
    """The comment that the preset begins with."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    lines = (line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line)
    return " ".join(lines)


def expanded(given: Sequence[str]) -> list[str]:
    """The words with policy=NAME replaced by what it chooses; who names a role beside it takes the preset's
    choice away."""
    own = {word.partition("=")[0] for word in given}
    found: list[str] = []
    for word in given:
        key, _, name = word.partition("=")
        if key != "policy":
            found.append(word)
            continue
        for chosen in words(name):
            node = chosen.partition("=")[0]
            if node not in own and node.partition(".")[0] not in own:
                found.append(chosen)
    return found


def check(argv: list[str]) -> int:
    """`python -m headway check`, with presets."""
    return kit.main(expanded(argv))


def _content(name: str) -> dict[str, Any]:
    if name not in names():
        raise ConfigError(f"policy={name}: there is no such preset.{near(name, names())}")
    content: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    return dict(content)
