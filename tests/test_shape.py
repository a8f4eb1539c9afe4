"""The shape of the core, counted: who writes what, who knows whose private names, how much there is to
read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.scripted import engine

from core.compose.defaults import PLANNING, default_names
from core.request import Request

CORE = Path(__file__).resolve().parent.parent / "core"
#: The path of a request, as docs/architecture.md lists it: what one reads in an hour.
HOUR = ("request", "roster", "blocks", "matching", "policy", "view", "step", "plan", "calls", "engine")
#: What is around that path: each has a room of its own.
ROOMS = ("cli", "compose", "measure", "testing")
HEAVY = ("torch", "triton", "transformers", "wandb", "hydra", "omegaconf")
#: What draws compositions by chance, or says what a policy is tested by.
ALLOWED_CHOICES = ("subject.py", "policies_page.py")
WRITTEN_AGAIN = {role: ("x", {}) for role in PLANNING} | {"victim": ("newest", {}), "eviction": ("lru", {})}
COMMAND_LINE = ("hydra", "omegaconf")
MOST_LINES = 2400
MOST_OF_A_FUNCTION = 60
MOST_ATTRIBUTES = 20
#: What a variable that holds a request is called in core.
REQUESTS = {"request", "r", "other", "needy", "victim"}
WRITES = {"append", "clear", "discard", "extend", "insert", "pop", "remove", "reverse", "sort", "update"}


def sources() -> dict[str, str]:
    return {str(path.relative_to(CORE)): path.read_text() for path in sorted(CORE.rglob("*.py"))}


def private_uses(source: str) -> Iterator[str]:
    """Names with a leading underscore that belong to an object or a module of another file."""
    tree = ast.parse(source)
    ours = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    ours |= {a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id in ("self", "cls")}
    for node in attributes:
        # os._exit is documented
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os"):
            continue
        if _private(node.attr) and node.attr not in ours:
            yield f"{node.lineno}: {ast.unparse(node)}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.lineno}: {alias.name}" for alias in node.names if _private(alias.name))


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def writes_of_requests(source: str) -> Iterator[str]:
    """Assignments to fields of a request, and calls that change a list or a mapping of one."""
    fields = set(Request.__slots__)

    def of_request(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and ast.unparse(node.value) in REQUESTS and node.attr in fields

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and of_request(node):
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and of_request(node.value):
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and node.attr in WRITES and of_request(node.value):
            yield f"{node.lineno}: {ast.unparse(node)}"


def long_functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_OF_A_FUNCTION:
            yield f"{node.lineno}: {node.name}"


def heavy_imports(source: str) -> Iterator[str]:
    """Imports of packages that a simulated run does without, anywhere in a file."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (f"{node.lineno}: {name}" for name in names if name.partition(".")[0] in HEAVY)


def defaults_by_name(source: str) -> Iterator[str]:
    """Mappings that name the whole default composition, which is written in conf/config.yaml alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            said = {
                leaf.value
                for value in node.values
                for leaf in ast.walk(value)
                if isinstance(leaf, ast.Constant)
            }
            if set(PLANNING) <= keys and {default_names()[role] for role in ("victim", "eviction")} <= said:
                yield f"{node.lineno}: {sorted(keys)}"


def found(search, but: str = "") -> list[str]:
    return [
        f"{file}:{place}" for file, source in sources().items() if file != but for place in search(source)
    ]


def test_no_file_of_the_core_uses_a_private_name_of_another() -> None:
    assert found(private_uses) == []


def test_requests_are_written_by_the_roster_alone() -> None:
    assert found(writes_of_requests, but="roster.py") == []
    assert len(list(writes_of_requests(sources()["roster.py"]))) > 30


def test_no_function_of_the_core_is_longer_than_a_screen() -> None:
    assert found(long_functions) == []


def test_the_path_of_a_request_is_read_in_an_hour() -> None:
    lines = {name: len((CORE / f"{name}.py").read_text().splitlines()) for name in HOUR}
    assert sum(lines.values()) <= MOST_LINES and lines["engine"] < 300, lines


def test_the_core_has_four_rooms() -> None:
    assert sorted(p.name for p in CORE.iterdir() if p.is_dir() and p.name != "__pycache__") == sorted(ROOMS)


def test_the_core_imports_nothing_heavy_and_hydra_for_the_command_line_alone() -> None:
    allowed = [
        f
        for f in found(heavy_imports)
        if f.startswith("cli/") and f.rpartition(" ")[2].partition(".")[0] in COMMAND_LINE
    ]
    assert found(heavy_imports) == allowed and len(allowed) > 10


def test_the_default_composition_is_written_once() -> None:
    files = [
        p
        for folder in ("core", "plugins", "experiments", "tests")
        for p in (CORE.parent / folder).rglob("*.py")
    ]
    places = [
        f"{p.name}:{place}"
        for p in files
        if p.name not in ALLOWED_CHOICES
        for place in defaults_by_name(p.read_text())
    ]
    assert places == []


def test_the_configs_are_no_code() -> None:
    assert [str(p) for p in (CORE.parent / "conf").rglob("*") if p.is_file() and p.suffix != ".yaml"] == []


def test_the_engine_has_few_attributes() -> None:
    assert len(vars(engine())) <= MOST_ATTRIBUTES, sorted(vars(engine()))


@pytest.mark.parametrize(
    ("search", "source", "places"),
    [
        (private_uses, "engine._left = 1\nself._mine\nother._mine\nos._exit(0)", ["1: engine._left"]),
        (private_uses, "from .step import _ONE, Granted", ["1: _ONE"]),
        (private_uses, "self._pool._free.pop()", ["1: self._pool._free"]),
        (
            writes_of_requests,
            "request.state = 1; request.num_tokens += 1",
            ["1: request.state", "1: request.num_tokens"],
        ),
        (
            writes_of_requests,
            "request.block_table.extend(x); r.token_ids[0] = 1",
            ["1: request.block_table.extend", "1: r.token_ids[0]"],
        ),
        (writes_of_requests, "x = request.state; request.block_table[0]; block.tags = 1", []),
        (
            defaults_by_name,
            str(WRITTEN_AGAIN),
            [f"1: {sorted(PLANNING)}"],
        ),
        (defaults_by_name, str(dict.fromkeys(PLANNING, "mine")), []),
        (
            heavy_imports,
            "import torch.nn\ndef f():\n    from hydra.core import x",
            ["1: torch.nn", "3: hydra.core"],
        ),
        (heavy_imports, "from .torch import x; import torchrun", []),
        (long_functions, "def f():\n" + "    x = 1\n" * 60, ["1: f"]),
        (long_functions, "def f():\n" + "    x = 1\n" * 59, []),
    ],
)
def test_what_must_not_be_is_found(search, source: str, places: list[str]) -> None:
    assert sorted(search(source)) == sorted(places)
