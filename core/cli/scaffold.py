"""`python -m headway new order mypaper`: an installable package with a plugin that works, its tests on the
kit, and a README."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from pathlib import Path
from string import Template

from ..compose.hooks import load_registry
from ..errors import ConfigError, near
from ..policy import ROLES
from ..renamed import renamed

TEMPLATES = Path(__file__).parent / "templates"
#: Roles that the conformance kit drives; the others bring tests of their own.
POLICIES = (
    "scheduler",
    "order",
    "victim",
    "chunk",
    "admission",
    "predictor",
    "cache",
    "eviction",
    "retention",
)
SETTLED = {"parallel": "parallel.tp and parallel.pp are settings of the engine, not plugins"}


def write_package(role: str, name: str, into: Path) -> list[Path]:
    """The files of a new package `into / name`, written. Raises ConfigError for a bad name, a taken one, or a
    directory that is there."""
    role = renamed(role)
    if role in SETTLED:
        raise ConfigError(f"there is no plugin to write for {role!r}: {SETTLED[role]}")
    if role not in ROLES:
        raise ConfigError(f"there is no role {role!r}.{near(role, ROLES)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name in ("none", "name"):
        raise ConfigError(
            f"{name!r} cannot name a plugin: use lower-case letters, digits and _, a letter first, such as "
            "'mypaper'"
        )
    if (role, name) in (registry := load_registry()).plugins:
        raise ConfigError(
            f"{role}={name} is there already, from {registry.plugins[role, name].origin}: choose another name"
        )
    root = into / name
    if root.exists():
        raise ConfigError(f"{root} is there already: nothing was written. Choose another name, or remove it")
    values = {
        "a_role": _with_article(role),
        "role": role,
        "name": name,
        "dist": name.replace("_", "-"),
        "Class": "".join(part.capitalize() for part in name.split("_")),
        "question": ROLES[role],
        "check": f"python -m headway check {role}={name}" if role in POLICIES else "",
        "kit": ";\n`check` runs the conformance kit" if role in POLICIES else "",
    }
    files = {
        "pyproject.toml": _fill("pyproject", values),
        "README.md": _fill("readme", values),
        f"headway_{name}.py": _fill(role, values),
        f"tests/test_{name}.py": _fill(f"{role}_test", values),
        ".gitignore": "*.egg-info/\n__pycache__/\n.pytest_cache/\n",
    }
    if role in POLICIES:
        files[f"tests/test_{name}_rules.py"] = _fill("kit_test", values)
    # roles that the kit does not drive have no line for it
    files["README.md"] = files["README.md"].replace("    \n", "")
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return [root / path for path in files]


def _with_article(role: str) -> str:
    if role in ("kernels", "tracking"):
        return role.capitalize()
    return f"{'An' if role[0] in 'aeiou' else 'A'} {role}"


def _fill(template: str, values: dict[str, str]) -> str:
    return Template((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")).substitute(values)


def main(argv: list[str]) -> int:
    roles = ", ".join(role for role in ROLES if role not in SETTLED)
    parser = argparse.ArgumentParser(
        prog="python -m headway new", description="Writes an installable plugin package."
    )
    parser.add_argument("role", help=f"what it decides: {roles}")
    parser.add_argument("name", help="its name on the command line, such as mypaper")
    parser.add_argument(
        "--into", type=Path, default=Path("."), help="the directory in which the package's own is made (here)"
    )
    options = parser.parse_args(argv)
    try:
        files = write_package(options.role, options.name, options.into)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    root = files[0].parent
    print("\n".join(f"wrote {path}" for path in files))
    print(f"\nnext:\n  pip install -e {root}\n  python run.py {options.role}={options.name}")
    print(
        f"  python -m headway check {options.role}={options.name}"
        if options.role in POLICIES
        else f"  pytest {root}"
    )
    return 0
