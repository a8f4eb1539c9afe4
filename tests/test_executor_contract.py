"""What an executor is told and what it says of itself, in the open: nothing is probed, and nothing set from
outside."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.compose.hooks import load_registry
from core.testing.oracle import OracleExecutor
from headway import (
    Arrival,
    BuildContext,
    Composition,
    ConfigError,
    EngineConfig,
    Executor,
    ExecutorCaps,
    ModelConfig,
    Observer,
    ParallelConfig,
    SamplingParams,
    TextStop,
    Workload,
    build,
    default_choices,
)
from plugins.executors.torch import TorchExecutor
from plugins.executors.torch.config import TorchConfig

ROOT = Path(__file__).parent.parent


@dataclass
class Talking(OracleExecutor):
    """Knows letters, and takes what it is built with from its context alone."""

    vocab_size: int = 50
    told = None

    def check(self, context: BuildContext) -> ExecutorCaps:
        self.told = "checked"
        return self.caps

    def build(self, context: BuildContext) -> Executor:
        self.told = context
        self.tokenizer = SimpleNamespace(encode=lambda text: [ord(letter) - ord("a") for letter in text])
        return self

    @property
    def stop_text(self):
        return lambda request: TextStop("", "x") if request.num_output_tokens == 2 else None


@dataclass
class Texts(Workload):
    def setup(self, ctx) -> None:
        super().setup(ctx)
        self.tokenizer = ctx.tokenizer

    def arrivals(self, seed, vocab_size, max_model_len):
        return [Arrival(0.0, self.tokenizer.encode("abc"), SamplingParams(max_tokens=9, stop=("x",)))]


@dataclass
class Watching(Observer):
    def __post_init__(self) -> None:
        self.heard = ()

    def on_build(self, run) -> None:
        self.heard = (*self.heard, run)

    def on_start(self, engine) -> None:
        self.heard = (*self.heard, engine)


@pytest.fixture
def registry():
    made = load_registry()
    made.add("executor", "talking", Talking)
    made.add("workload", "texts", Texts)
    made.add("tracking", "watching", Watching)
    return made


def composed(executor: str = "talking", **fields) -> Composition:
    choices = default_choices(executor=executor, workload="texts", tracking="watching")
    return Composition(choices, EngineConfig(num_blocks=16, block_size=4), **fields)


def test_what_a_run_offers_arrives_in_one_object(registry) -> None:
    composition = composed(seed=7, model=ModelConfig("made", vocab_size=50))
    run = build(registry, composition)
    told = run.engine.executor.told
    assert (told.seed, told.model, told.engine, told.parallel) == (
        7,
        composition.model,
        composition.engine,
        composition.parallel,
    )
    assert told.facts()["executor"] == "talking" and told.kernels_named("torch").plugin_name == "torch"
    with pytest.raises(ConfigError, match="the shape of model 'made' is not known"):
        _ = told.shape


def test_tokenizer_stop_strings_and_the_tracked_run_go_the_public_way(registry) -> None:
    run = build(registry, composed())
    result = run.execute()
    assert result.outputs[0].num_prompt_tokens == 3 and result.outputs[0].finish_reason == "stop"
    assert len(result.outputs[0].output_token_ids) == 2
    assert run.engine.observers[-1].heard == (run, run.engine)


@dataclass
class Wrapping(Executor):
    """Another executor runs in its place."""

    caps = None

    def build(self, context: BuildContext) -> Executor:
        inner = context.executor_named("talking").build(context)
        inner.vocab_size = 9
        inner.plugin_name = ""
        return inner


def test_who_is_built_may_be_another(registry) -> None:
    registry.add("executor", "wrapping", Wrapping)
    run = build(registry, composed("wrapping"))
    assert (
        isinstance(run.engine.executor, Talking) and run.roles["executor"].plugin_name == "executor=wrapping"
    )
    assert run.execute().status == "finished"


@dataclass
class Unready(Executor):
    """Says nothing of itself."""

    def prepare(self, shape) -> None:
        raise AssertionError("nobody calls it")


def test_an_executor_that_says_nothing_of_itself_is_named(registry) -> None:
    registry.add("executor", "unready", Unready)
    with pytest.raises(ConfigError, match=r"executor=unready has no caps: set them .* in build\(context\)"):
        build(registry, composed("unready"))


def test_ranks_are_for_executors_that_have_them(registry) -> None:
    with pytest.raises(ConfigError, match="executor=talking runs on one rank"):
        build(registry, composed(parallel=ParallelConfig(tp=2)))
    for name, several, torchrun in (
        ("torch", True, True),
        ("sim", True, False),
        ("replay", True, True),
        ("oracle", False, False),
    ):
        executor = registry.get("executor", name).build()
        assert (executor.several_ranks, executor.torchrun) == (several, torchrun)


def test_ranks_are_told_every_parameter_of_the_real_engine() -> None:
    """With its own defaults: what is not among them would silently hold on the driver alone."""
    given = {f.name: f.default for f in fields(TorchExecutor)}
    assert given == {f.name: f.default for f in fields(TorchConfig)}
    assert TorchExecutor(device="cpu", host_blocks=3).config == TorchConfig(device="cpu", host_blocks=3)


# ---- who imports whom ------------------------------------------------------------------------------------


def imports(file: Path) -> set[str]:
    """Files of plugins that this one imports at any place, in functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parents[node.level - 1]
            module = base.joinpath(*(node.module or "").split(".")) if node.module else base
            names = [module / alias.name for alias in node.names] + [module]
            found |= {
                str(p)
                for name in names
                for p in (name.with_suffix(".py"), name / "__init__.py")
                if p.is_file()
            }
    return found - {str(file)}


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that this file imports, directly or not."""
    found, left = set(), [start]
    while left:
        new = graph.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def rings(graph: dict[str, set[str]], one: str, other: str) -> list[tuple[str, str]]:
    """Pairs of files, one in each folder, that import each other."""
    reach = {file: reached(graph, file) for file in graph}
    ours, theirs = ([file for file in graph if folder in file] for folder in (one, other))
    return [(a, b) for a in ours for b in theirs if b in reach[a] and a in reach[b]]


def test_the_real_engine_and_its_ranks_do_not_import_each_other_in_a_ring() -> None:
    folders = ("plugins/executors/torch", "plugins/parallel")
    graph = {str(file): imports(file) for folder in folders for file in sorted((ROOT / folder).glob("*.py"))}
    assert rings(graph, *folders) == []
    torch, driver = (
        str(ROOT / file) for file in ("plugins/executors/torch/__init__.py", "plugins/parallel/execution.py")
    )
    assert driver in reached(graph, torch)  # and not the other way round


def test_a_ring_is_found() -> None:
    assert rings({"x/a": {"y/b"}, "y/b": {"y/c"}, "y/c": {"x/a"}}, "x/", "y/") == [
        ("x/a", "y/b"),
        ("x/a", "y/c"),
    ]
    assert rings({"x/a": {"y/b", "y/c"}, "y/b": {"y/c"}, "y/c": set()}, "x/", "y/") == []
