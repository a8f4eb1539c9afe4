"""Errors name the plugin that did wrong, not its neighbour, whatever it answered, raised or changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
from helpers.scripted import ask, engine, everybody

from core.compose.build import Composition, Run
from core.compose.config import EngineConfig
from core.compose.hooks import Origin, Registry, hookimpl
from core.engine import Engine
from core.errors import ConfigError, PluginError, PolicyError, WorkloadError
from core.execution import StepResult
from core.inputs import Arrival, SamplingParams
from core.keyed import KeyEviction, KeyOrder
from core.ledger import Mutated
from core.outside import Observer, Workload
from core.policy import (
    Admission,
    ChunkSize,
    Eviction,
    LengthPrediction,
    Order,
    Predictor,
    Retention,
    Victim,
)
from core.testing.oracle import OracleExecutor
from core.testing.subject import Subject
from plugins.cache.hash import HashBlocks
from plugins.schedulers.chunked import ChunkedPrefill
from plugins.schedulers.order.fcfs import FirstCome
from plugins.schedulers.preemptive import Preemptive

NAN = float("nan")
CROWD = [ask([i, 1, 2, 3] * 3, 6, time=0.01 * i) for i in range(5)]  # too many for eight blocks


def composed(**roles: Any) -> Engine:
    """Chunked prefill on few blocks, so that every role is asked."""
    return engine(roles={"scheduler": ChunkedPrefill(), **roles}, num_blocks=8)


def failing(running: Engine) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        running.run(CROWD)
    return caught.value


def answering(role: str, base: type, method: str, answer: Callable[..., Any]) -> Any:
    """A plugin whose method answers this. Its function has no `self`, so that no traceback gives it away."""
    made = type("Wrong", (base,), {"plugin_name": f"{role}=wrong"})()
    setattr(made, method, lambda *args: answer(*args))
    return made


# ---- wrong answers ---------------------------------------------------------------------------------------


class Asks(FirstCome):
    """An order that asks the predictor itself, as sjf does."""

    def setup(self, ctx):
        super().setup(ctx)
        self._predictor = ctx.roles["predictor"]

    def on_arrival(self, request, now):
        self._predictor.predict(request)


WRONG: list[tuple[str, type, str, Callable[..., Any], str]] = [
    ("order", Order, "order", lambda view: None, "answered None: expected an iterable"),
    ("order", Order, "order", lambda view: [None], "order() named None, which does not wait"),
    ("order", Order, "order", lambda view: [r.id for r in view.waiting], "which does not wait"),
    (
        "order",
        Order,
        "order",
        lambda view: [*view.running, *view.waiting],
        "which does not wait: name requests of view.waiting",
    ),
    ("order", Order, "order", lambda view: (r.nothing for r in view.waiting), "raised AttributeError"),
    ("victim", Victim, "victims", lambda need, view: None, "answered None: expected an iterable"),
    ("victim", Victim, "victims", lambda need, view: [None], "victims() named None, which does not run"),
    (
        "victim",
        Victim,
        "victims",
        lambda need, view: view.waiting,
        "which does not run: yield requests of view.running",
    ),
    ("victim", Victim, "victims", lambda need, view: (1 / 0 for _ in "x"), "raised ZeroDivisionError"),
    (
        "chunk",
        ChunkSize,
        "tokens",
        lambda request, left, view: None,
        "tokens() answered None: expected 0 to",
    ),
    (
        "chunk",
        ChunkSize,
        "tokens",
        lambda request, left, view: NAN,
        "tokens() answered nan: expected 0 to",
    ),
    ("chunk", ChunkSize, "tokens", lambda request, left, view: 1 / 0, "raised ZeroDivisionError"),
    (
        "admission",
        Admission,
        "admit",
        lambda request, view: None,
        "admit() answered None: expected Admit, Defer or Reject",
    ),
    ("admission", Admission, "admit", lambda request, view: 1 / 0, "raised ZeroDivisionError"),
    (
        "predictor",
        Predictor,
        "predict",
        lambda request: None,
        "predict() answered None: expected a LengthPrediction",
    ),
    ("predictor", Predictor, "predict", lambda request: 7.0, "predict() answered 7.0"),
    (
        "predictor",
        Predictor,
        "predict",
        lambda request: LengthPrediction(NAN, 1.0),
        "mean and upper are finite",
    ),
    (
        "predictor",
        Predictor,
        "predict",
        lambda request: LengthPrediction(1.0, float("inf")),
        "mean and upper are finite",
    ),
    (
        "predictor",
        Predictor,
        "predict",
        lambda request: LengthPrediction(1.0, None),
        "mean and upper are finite",
    ),
    ("cache", HashBlocks, "match", lambda request, known, limit: None, "match() answered None"),
    ("cache", HashBlocks, "match", lambda request, known, limit: [99][:limit], "match() answered [99]"),
    ("cache", HashBlocks, "match", lambda request, known, limit: [-1][:limit], "match() answered [-1]"),
    ("cache", HashBlocks, "match", lambda request, known, limit: ["0"][:limit], "match() answered ['0']"),
    ("cache", HashBlocks, "insert", lambda request, parent, tokens, block: None, "insert() named block None"),
    ("cache", HashBlocks, "insert", lambda request, parent, tokens, block: 99, "insert() named block 99"),
    ("eviction", Eviction, "candidates", lambda n: None, "candidates() yielded nothing"),
    ("eviction", Eviction, "candidates", lambda n: [None], "candidates() yielded None"),
    ("eviction", Eviction, "candidates", lambda n: [3], "candidates() yielded 3"),
    (
        "retention",
        Retention,
        "retain",
        lambda request, kv, now: kv.pin(request, NAN),
        "raised ValueError: pin(until=nan)",
    ),
    (
        "retention",
        Retention,
        "retain",
        lambda request, kv, now: kv.pin(request, None),
        "raised ValueError: pin(until=None)",
    ),
    ("retention", Retention, "retain", lambda request, kv, now: 1 / 0, "raised ZeroDivisionError"),
]


@pytest.mark.parametrize(
    ("role", "base", "method", "answer", "says"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)]
)
def test_a_wrong_answer_is_its_plugin_s(
    role: str, base: type, method: str, answer: Callable[..., Any], says: str
) -> None:
    others: dict[str, Any] = {"order": Asks()} if role == "predictor" else {}
    error = failing(composed(**others, **{role: answering(role, base, method, answer)}))
    assert error.plugin == f"{role}=wrong" and says in str(error)
    assert error.partial.status == "failed" and len(error.partial.outputs) >= 1


@pytest.mark.parametrize("key", [NAN, (1, NAN), (0, (NAN,))])
def test_a_key_that_sorts_nowhere_is_named(key: Any) -> None:
    class NoOrder(KeyOrder):
        plugin_name = "order=wrong"

        def key(self, request):
            return key

    class NoTurn(KeyEviction):
        plugin_name = "eviction=wrong"

        def key(self, block):
            return key

    for role, wrong in (("order", NoOrder()), ("eviction", NoTurn())):
        error = failing(composed(**{role: wrong}))
        assert error.plugin == f"{role}=wrong" and "which sorts nowhere" in str(error)


def test_a_key_that_raises_is_the_order_s_where_a_scheduler_asks_for_it() -> None:
    class Divides(KeyOrder):
        plugin_name = "order=wrong"

        def key(self, request):
            return 1 / (request.state.value != "running")

    error = failing(composed(scheduler=Preemptive(), order=Divides()))
    assert error.plugin == "order=wrong" and "key() raised ZeroDivisionError" in str(error)
    assert error.step >= 0 and "view: step=" in str(error)


def test_a_step_time_that_is_no_time_is_its_executor_s() -> None:
    class Lost(OracleExecutor):
        plugin_name = "executor=lost"

        def step_time(self, starts, lengths):
            return NAN if len(starts) == 1 else 0.01

    error = failing(engine(lambda step, view: view.step_time([0], [4]), executor=Lost()))
    assert error.plugin == "executor=lost" and "step_time() answered nan" in str(error)


def test_a_request_that_an_order_names_twice_is_its_own_fault() -> None:
    twice = answering("order", Order, "order", lambda view: [*view.waiting, *view.waiting])
    assert failing(composed(order=twice)).plugin == "order=wrong"


def test_an_eviction_that_names_a_block_in_use_is_named() -> None:
    running = composed(
        eviction=answering(
            "eviction", Eviction, "candidates", lambda n: [b for b in running.pool.blocks if b.ref_count]
        )
    )
    error = failing(running)
    assert error.plugin == "eviction=wrong" and "which is referenced or pinned" in str(error)


def test_what_a_policy_exits_with_is_an_error_and_not_the_end_of_the_process() -> None:
    leaves = answering("order", Order, "order", lambda view: (_ for _ in ()).throw(SystemExit(0)))
    assert "raised SystemExit: 0" in str(failing(composed(order=leaves)))


# ---- executors -------------------------------------------------------------------------------------------


@dataclass
class Garbled(OracleExecutor):
    """Changes what comes back."""

    change: Any = None
    plugin_name = "executor=garbled"

    def collect(self, ticket):
        return self.change(super().collect(ticket))


def other_tokens(change: Callable[[list[list[int]]], Any]) -> Callable[[StepResult], StepResult]:
    return lambda result: replace(result, tokens=change(list(result.tokens)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_tokens(lambda tokens: tokens[:-1]), "lists of tokens for"),
        (other_tokens(lambda tokens: [*tokens, [1]]), "lists of tokens for"),
        (
            other_tokens(lambda tokens: [[] for _ in tokens]),
            "answered no token in step 0: expected a token id",
        ),
        (
            other_tokens(lambda tokens: [[-1] for _ in tokens]),
            "answered no token in step 0: expected a token id",
        ),
        (other_tokens(lambda tokens: [[-2] for _ in tokens]), "answered -2 in step 0: expected a token id"),
        (other_tokens(lambda tokens: [[None] for _ in tokens]), "answered None in step 0"),
        (
            other_tokens(lambda tokens: [new[0] if new else -1 for new in tokens]),
            "in step 0: expected a list of tokens per planned request",
        ),
        (
            other_tokens(lambda tokens: None),
            "answered None in step 0: expected a list of tokens per planned request",
        ),
        (
            other_tokens(lambda tokens: [[1, 2] for _ in tokens]),
            "answered [1, 2] in step 0: expected at most 1 token ids",
        ),
        (other_tokens(lambda tokens: [[1, None] for _ in tokens]), "answered [1, None] in step 0"),
        (
            other_tokens(lambda tokens: [new or [2] for new in tokens]),
            ": expected none, since its chunk samples nothing",
        ),
        (lambda result: replace(result, end=NAN), "end=nan for step 0: expected finite seconds"),
        (lambda result: replace(result, start=None), "start=None"),
        (lambda result: replace(result, end=float("inf")), "end=inf"),
        (lambda result: None, "collect() answered None: expected a StepResult"),
        (lambda result: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_an_executor_s_answer_is_tokens_for_each_chunk_that_samples(
    change: Callable[[StepResult], Any], says: str
) -> None:
    running = engine(everybody, executor=Garbled(change=change, token_seconds=0.0), max_num_batched_tokens=14)
    error = failing(running)
    assert error.plugin == "executor=garbled" and says in str(error)


def test_what_decides_stop_strings_is_the_executor_s() -> None:
    roles = engine(executor=Garbled(change=lambda result: result)).roles.given
    running = Engine(roles, EngineConfig(4, 16), stop_text=lambda request: 1 / 0)
    with pytest.raises(PolicyError, match="raised ZeroDivisionError") as caught:
        running.run([Arrival(0.0, [1, 2], SamplingParams(stop=("x",)))])
    assert caught.value.plugin == "executor=garbled" and caught.value.step == 0


# ---- workloads -------------------------------------------------------------------------------------------


class Loop(Workload):
    plugin_name = "workload=loop"

    def arrivals(self, seed, vocab_size, max_model_len):
        return [ask(), ask()]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda request, now: None, "answered None: expected an iterable"),
        (lambda request, now: [None], "what follows x is None: expected an Arrival"),
        (lambda request, now: [ask(time=now - 0.005)], "expected a finite time of at least"),
        (lambda request, now: [ask(time=NAN)], "is at nan s"),
        (lambda request, now: [ask(time=float("inf"))], "is at inf s"),
        (lambda request, now: (1 / 0 for _ in "x"), "raised ZeroDivisionError"),
    ],
)
def test_what_follows_an_answer_is_checked(answer: Callable[..., Any], says: str) -> None:
    for name, roles in (("the given arrivals", {}), ("workload=loop", {"workload": Loop()})):
        with pytest.raises((PolicyError, WorkloadError), match=name) as caught:
            engine(roles=roles).run([ask(4, 1, id="x")], answer)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    ("arrivals", "says"),
    [
        (lambda *args: None, r"arrivals\(\) answered None"),
        (lambda *args: 1 / 0, "raised ZeroDivisionError"),
        (lambda *args: (1 / 0 for _ in "x"), "raised ZeroDivisionError"),
        (lambda *args: iter([ask(), None]), "arrival 1 is None: expected an Arrival"),
    ],
)
def test_a_workload_is_named(arrivals: Callable[..., Any], says: str) -> None:
    run = runnable(hooked())
    run.roles["workload"].arrivals = arrivals
    with pytest.raises((PolicyError, WorkloadError), match=f"workload=loop.*{says}"):
        run.execute()


# ---- observers and hooks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["on_start", "on_step", "on_requests", "close"])
def test_an_observer_is_named_and_its_neighbours_are_closed(event: str) -> None:
    class Curve(Observer):
        closed = False

        def close(self, result):
            self.closed = True

    broken, neighbour = Curve(), Curve()
    setattr(broken, event, lambda *args: 1 / 0)
    with pytest.raises(PolicyError, match="plugin Curve.*raised ZeroDivisionError") as caught:
        engine(observers=[broken, neighbour]).run([ask(4, 2)])
    assert neighbour.closed and caught.value.partial.status == ("finished" if event == "close" else "failed")


def runnable(registry: Registry) -> Run:
    """A run of plain policies on the oracle executor."""
    roles = {**Subject().plain_roles(), "workload": Loop(), "executor": OracleExecutor()}
    return Run(Composition({}), roles, {}, Engine(roles, EngineConfig(4, 16)), registry)


def hooked(**hooks: Callable[..., Any]) -> Registry:
    registry = Registry()
    for name in ("first", "second"):
        module = ModuleType(name)
        if name == "second":
            vars(module).update({hook: hookimpl(function) for hook, function in hooks.items()})
        registry.register(module, Origin(name, f"{name}.py"))
    return registry


def leave(run):
    raise SystemExit(3)


def test_a_hook_that_raises_is_named() -> None:
    assert len(runnable(hooked()).execute().outputs) == 2
    with pytest.raises(PluginError, match="plugin second: headway_run_start raised ZeroDivisionError"):
        runnable(hooked(headway_run_start=lambda run: 1 / 0)).execute()
    with pytest.raises(PluginError, match="plugin second: headway_run_start raised SystemExit: 3"):
        runnable(hooked(headway_run_start=leave)).execute()
    with pytest.raises(
        PluginError, match="plugin second: headway_run_end raised ZeroDivisionError"
    ) as caught:
        runnable(hooked(headway_run_end=lambda run, result: 1 / 0)).execute()
    assert len(caught.value.partial.outputs) == 2, "what was done is kept"
    for answer in (lambda run: Observer(), lambda run: 7):
        with pytest.raises(PluginError, match="plugin second: headway_observers answered"):
            hooked(headway_observers=answer).observers(run=None)


def test_a_hook_at_the_end_does_not_hide_the_run_s_own_error() -> None:
    run = runnable(hooked(headway_run_end=lambda run, result: 1 / 0))
    run.engine.roles.scheduler.plan = lambda step, view: 1 / 0
    with pytest.raises(PolicyError, match="scheduler") as caught:
        run.execute()
    assert "headway_run_end" in caught.value.__notes__[0]


def test_a_run_is_executed_once() -> None:
    run = runnable(hooked())
    run.execute()
    with pytest.raises(ConfigError, match="was executed before"):
        run.execute()


# ---- what policies may only read -------------------------------------------------------------------------


def set_state(request: Any) -> None:
    request.state = type(request.state).WAITING


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "token_ids": lambda r: r.token_ids.append(1),
    "block_table": lambda r: r.block_table.reverse(),
    "num_tokens": lambda r: setattr(r, "num_tokens", r.num_tokens - 1),
    "num_computed_tokens": lambda r: setattr(r, "num_computed_tokens", r.num_computed_tokens - 1),
    "num_preemptions": lambda r: setattr(r, "num_preemptions", 7),
    "num_cached_tokens": lambda r: setattr(r, "num_cached_tokens", 3),
    "num_recomputed_tokens": lambda r: setattr(r, "num_recomputed_tokens", 3),
    "state": set_state,
    "tags": lambda r: setattr(r, "tags", replace(r.tags, client="me")),
    "sampling": lambda r: setattr(r, "sampling", replace(r.sampling, max_tokens=1)),
    "arrival_time": lambda r: setattr(r, "arrival_time", -1.0),
    "slo": lambda r: setattr(r, "slo", replace(r.slo, ttft=9.0)),
}


@pytest.mark.parametrize("field", MUTATIONS)
@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_policy_that_changes_a_request_is_found_by_the_end_of_the_step(
    field: str, max_inflight: int
) -> None:
    class Meddles(Retention):
        def on_step_end(self, record):
            request = next(
                (r for r in record.plan.requests if r.state.value == "running" and len(r.block_table) > 1),
                None,
            )
            if record.step == 2 and request is not None:
                MUTATIONS[field](request)

    with pytest.raises(
        Mutated, match=rf"request r\d: {field} is .* a policy \(.*retention=Meddles.*\) changed after step 2"
    ):
        engine(roles={"retention": Meddles()}, max_inflight=max_inflight).run([ask(9, 9), ask(9, 9)])


def test_a_policy_that_changes_a_request_while_it_plans_is_found_before_the_launch() -> None:
    def script(step, view):
        everybody(step, view)
        if view.step == 1:
            view.running[0].token_ids[0] += 1

    running = engine(script)
    with pytest.raises(Mutated, match="token_ids .* changed while step 1 was planned"):
        running.run([ask(9, 9)])


def test_without_the_check_nothing_is_compared() -> None:
    assert engine(check=False).ledger is None and engine().ledger is not None
