"""What the README promises exists."""

from __future__ import annotations

import re
from pathlib import Path

from core.compose.hooks import load_registry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def table() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", README, re.MULTILINE)
    return {role: set(re.findall(r"[\w]+", re.sub(r"`[^`]*`", "", names))) for role, names in rows}


def test_the_plugin_table_lists_exactly_what_is_in_the_tree() -> None:
    registry = load_registry()
    listed = table()
    assert set(listed) >= {
        "scheduler",
        "order",
        "victim",
        "cache",
        "eviction",
        "executor",
        "kernels",
        "workload",
    }
    for role, names in listed.items():
        if role == "parallel":
            continue
        in_tree = {name for (r, name), p in registry.plugins.items() if r == role and not p.origin.dist}
        assert names == in_tree, (
            f"README's row of {role}: missing {in_tree - names}, too many {names - in_tree}"
        )


def test_links_lead_to_files() -> None:
    for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"
