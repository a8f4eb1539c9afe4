"""From names and parameters to a running system, in plain Python: what `run.py`, `headway.LLM` and the conformance kit share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import ConfigError, HeadwayError, PluginError, WorkloadError, near
from ..inputs import SLO, Arrival
from ..measure.step_log import StepLog
from ..outputs import RunResult
from ..policy import SERVICES, Observer, Role, Workload
from ..roles import check_limits
from .config import EngineConfig, Hardware, ModelConfig, ParallelConfig, ResultsConfig
from .facts import facts
from .hooks import Plugin, Registry
from .params import check as check_values
from .params import checked, param


@dataclass
class Composition:
    """One run as data: a (name, parameters) pair a role, and the nodes that belong to no role."""

    choices: dict[str, tuple[str, dict[str, Any]]]
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: Hardware = field(default_factory=Hardware)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    slo: SLO = field(default_factory=SLO)  # for requests that bring none
    results: ResultsConfig = field(default_factory=ResultsConfig)
    concealed: dict[str, str] = field(default_factory=dict)  # value that nothing may store -> how the config names it
    seed: int = param(0, min=-(2**63), max=2**63 - 1)

    def __post_init__(self) -> None:
        self.seed = checked(type(self), {"seed": self.seed}, "")["seed"]


@dataclass
class Run:
    """A built run. Hooks and observers get it; `directory` is where they may write, None where nothing is to be written."""

    composition: Composition
    roles: dict[str, Role]
    plugins: dict[str, Plugin]
    engine: Engine
    registry: Registry
    directory: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)  # the whole composed config as plain data
    overrides: list[str] = field(default_factory=list)  # what the user typed
    group: str = ""  # name of the sweep, "" for a single run
    step_log: StepLog = field(default_factory=StepLog, repr=False)  # observers that write files read it
    _executed: bool = field(default=False, init=False, repr=False)

    @property
    def name(self) -> str:
        return " ".join(self.overrides) or "defaults"

    def writes(self, file: str) -> bool:
        """Whether the run leaves this one of the files that `results.files` names."""
        return self.directory is not None and file in self.composition.results.files

    def execute(self) -> RunResult:
        """Runs the workload to its end, once. Interrupts give a partial result; errors are raised with it as `partial`."""
        if self._executed:
            raise ConfigError("this run was executed before, and its executor is closed: build another from the same composition")
        self._executed = True
        engine, slo = self.engine, self.composition.slo
        workload: Any = self.roles["workload"]
        try:
            seed, vocab_size = self.composition.seed, engine.executor.caps.vocab_size
            arrivals = engine.calls.call(workload, workload.arrivals, seed, vocab_size, engine.max_model_len)
            if not hasattr(arrivals, "__iter__"):
                raise WorkloadError(f"{workload.plugin_name}: arrivals() answered {arrivals!r}: expected an iterable of Arrivals")
            self.registry.call("headway_run_start", run=self)
            result = engine.run(with_slo(arrivals, slo), lambda request, now: with_slo(workload.on_result(request, now), slo))
        except BaseException as error:
            if (partial := getattr(error, "partial", None)) is not None:
                self._tell_end(partial, error)
            raise
        finally:
            engine.executor.close()
        self._tell_end(result)
        return result

    def _tell_end(self, result: RunResult, error: BaseException | None = None) -> None:
        """The hooks at the end. What one of them raises carries the result, and never takes the place of the run's own error."""
        try:
            self.registry.call("headway_run_end", run=self, result=result)
        except HeadwayError as late:
            if error is None:
                late.partial = result  # type: ignore[attr-defined]
                raise
            error.add_note(str(late))


def build_roles(registry: Registry, choices: dict[str, tuple[str, dict[str, Any]]]) -> tuple[dict[str, Role], dict[str, Plugin]]:
    """One object a role; roles that name the same factory share one object, with the parameters of the node that gives them.

    Raises ConfigError for names, parameters and values that cannot be, PluginError for a chosen plugin that is broken.
    """
    plugins = {role: registry.get(role, name) for role, (name, _) in choices.items()}
    shared: dict[int, list[str]] = {}
    for role, plugin in plugins.items():
        shared.setdefault(id(plugin.factory), []).append(role)
    roles: dict[str, Role] = {}
    for together in shared.values():
        parameters = _merge(plugins, choices, together)
        plugin = plugins[together[0]]
        built = _construct(plugin, parameters)
        if not built.plugin_name:
            built.plugin_name = f"{plugin.role}={plugin.name}"
        roles |= dict.fromkeys(together, built)
    return {role: roles[role] for role in choices}, plugins


def _merge(plugins: dict[str, Plugin], choices: dict[str, tuple[str, dict[str, Any]]], together: list[str]) -> dict[str, Any]:
    """Parameters of one object that several nodes describe: what differs from the default was given by somebody."""
    merged: dict[str, Any] = {}
    given: dict[str, str] = {}
    for role in together:
        plugin = plugins[role]
        known = {f.name: f for f in plugin.parameters()}
        for name, value in choices[role][1].items():
            if name not in known:
                raise ConfigError(f"{role}.{name}: {role}={plugin.name} has no such parameter.{near(name, known)}")
            if name not in given:
                merged[name] = value
            if len(together) == 1 or value == _default(known[name]):
                continue
            if name in given and merged[name] != value:
                raise ConfigError(
                    f"{given[name]}.{name}={merged[name]} and {role}.{name}={value}: "
                    f"{' and '.join(together)} are one object ({plugin.name}), so give {name} once"
                )
            merged[name], given[name] = value, role
    return merged


def _default(parameter: Field[Any]) -> Any:
    return parameter.default_factory() if parameter.default_factory is not MISSING else parameter.default


def _construct(plugin: Plugin, parameters: dict[str, Any]) -> Role:
    try:
        built: Role = plugin.build(**parameters)
    except HeadwayError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{plugin.role}={plugin.name} refuses its parameters: {error}") from error
    except SystemExit as error:
        message = f"{plugin.role}={plugin.name} called sys.exit({error.code}) while it was built: raise an error instead"
        raise PluginError(message) from error
    return built


def check_executor(registry: Registry, executor: Any, composition: Composition, roles: dict[str, Role]) -> None:
    """Lets an executor refuse what it can without weights or ranks: its `check`, which names what it needs as `prepare` does.

    An executor that sets `caps` there is checked against the engine's limits as well.
    """
    offered = _offers(registry, composition, roles)
    wanted = inspect.signature(getattr(executor, "prepare", _needs_nothing)).parameters
    if composition.parallel.world_size > 1 and not {"parallel", "tp"} & set(wanted):
        given = f"parallel.tp={composition.parallel.tp} parallel.pp={composition.parallel.pp}"
        raise ConfigError(f"{given}: {executor.plugin_name} runs on one rank; more is not there yet. Set both to 1, or use executor=sim")
    _call(executor, "check", offered)


def prepare_executor(registry: Registry, executor: Any, composition: Composition, roles: dict[str, Role]) -> None:
    """Hands an executor what its `prepare` names among: model, shape, hardware, kernels, backends, parallel, tp, pp, engine,
    seed, facts."""
    _call(executor, "prepare", _offers(registry, composition, roles))


def _offers(registry: Registry, composition: Composition, roles: dict[str, Role]) -> dict[str, Callable[[], Any]]:
    """What a run offers its executor by name. `shape` is worked out only for those that ask, since a checkpoint brings its own."""
    return {
        "model": lambda: composition.model,
        "shape": composition.model.shape,
        "hardware": lambda: composition.hardware,
        "kernels": lambda: roles.get("kernels"),
        "backends": lambda: lambda name: _construct(registry.get("kernels", name), {}),
        "parallel": lambda: composition.parallel,
        "tp": lambda: composition.parallel.tp,
        "pp": lambda: composition.parallel.pp,
        "engine": lambda: composition.engine,
        "seed": lambda: composition.seed,
        "facts": lambda: facts(registry, composition),
    }


def _call(executor: Any, method: str, offered: dict[str, Callable[[], Any]]) -> None:
    function = getattr(executor, method, _needs_nothing)
    wanted = inspect.signature(function).parameters
    unknown = [n for n, p in wanted.items() if n not in offered and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if unknown:
        raise ConfigError(f"{executor.plugin_name}.{method} asks for {', '.join(unknown)}: a run can offer {', '.join(offered)}")
    function(**{name: offered[name]() for name in wanted if name in offered})


def _needs_nothing() -> None:
    """An executor without this method."""


def _inner_executor(registry: Registry, executor: Any) -> Any:
    """executor=replay executor.inner=sim: another executor in the step times of a record. None where there is none."""
    if not getattr(executor, "inner", ""):
        return None
    inner = _construct(registry.get("executor", executor.inner), {})
    inner.plugin_name = f"executor={executor.inner}"
    return inner


def _ready_executor(registry: Registry, composition: Composition, roles: dict[str, Role]) -> Role:
    executor: Any = roles["executor"]
    prepare_executor(registry, executor, composition, roles)
    inner = _inner_executor(registry, executor)
    if inner is None:
        return roles["executor"]
    prepare_executor(registry, inner, composition, roles)
    wrapped: Role = executor.over(inner)
    wrapped.plugin_name = f"{executor.plugin_name}({executor.inner})"
    return wrapped


def check(registry: Registry, composition: Composition) -> tuple[dict[str, Role], dict[str, Plugin]]:
    """The roles of a run and their plugins, after everything that can be known without weights, ranks or a pool of blocks.

    `build` begins with it, and a sweep asks it about every job before the first one runs. Raises HeadwayError for names,
    parameters and their ranges, services that a role requires, files, and limits that the executor cannot keep.
    """
    for node in ("engine", "model", "hardware", "parallel", "slo"):
        check_values(getattr(composition, node), node)  # whatever was set on them since they were made
    roles, plugins = build_roles(registry, composition.choices)
    for role in roles.values():
        if "predictor" in role.requires and "predictor" not in roles:
            names = registry.names("predictor")
            known = f"set predictor={', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else SERVICES["predictor"]
            raise ConfigError(f"{role.plugin_name} needs a predictor, and none is chosen: {known}")
    workload: Any = roles.get("workload")
    if isinstance(workload, Workload):
        workload.check()
    _check_targets(roles, composition.slo)
    executor: Any = roles["executor"]
    check_executor(registry, executor, composition, roles)
    if (inner := _inner_executor(registry, executor)) is not None:
        check_executor(registry, inner, composition, roles)
        executor = inner
    if getattr(executor, "caps", None) is not None:
        _check_limits(executor, composition, roles)
    return roles, plugins


def _check_targets(roles: dict[str, Role], slo: SLO) -> None:
    """Raises ConfigError for a policy that goes by latency targets where no request can have one: it would
    silently do nothing.
    """
    tiers = getattr(roles.get("workload"), "slo_tiers", slo)  # a workload without the parameter may bring targets of its own
    if slo == SLO() and not tiers:
        for role in roles.values():
            if "slo" in role.requires:
                raise ConfigError(f"{role.plugin_name} goes by latency targets, and no request has any: {SERVICES['slo']}")


def _check_limits(executor: Any, composition: Composition, roles: dict[str, Role]) -> None:
    limits = _limits(composition)
    check_limits(limits, executor.caps, executor.plugin_name)
    for role in roles.values():
        if "step_time" in role.requires and executor.cost_model is None:
            raise ConfigError(f"{role.plugin_name} needs step_time, and none is chosen: {SERVICES['step_time']}")


def _limits(composition: Composition) -> EngineConfig:
    """A stage without a plan of its own idles, so a pipeline has at least as many in flight as it has stages.
    Where none is given, the executor says so."""
    given = composition.engine.max_inflight
    return replace(composition.engine, max_inflight=None if given is None else max(given, composition.parallel.pp))


def build(registry: Registry, composition: Composition, observers: Iterable[Observer] = (), **about: Any) -> Run:
    """A run that is ready to `execute`. `about`: directory, config, overrides and group of the Run.

    Errors come in the order of their cost: names and parameters first, the checkpoint last.
    """
    roles, plugins = check(registry, composition)
    tracking = roles.pop("tracking", None)
    executor: Any = _ready_executor(registry, composition, roles)
    roles["executor"] = executor
    try:
        workload: Any = roles.get("workload")
        if hasattr(workload, "tokenizer"):
            workload.tokenizer = getattr(executor, "tokenizer", None)  # for real texts
        stop_text = getattr(executor, "stop_text", None)
        engine = Engine(roles, _limits(composition), seed=composition.seed, stop_text=stop_text)
        run = Run(composition, roles, plugins, engine, registry, **about)
        found = registry.observers(run)
        logs = [run.step_log] if run.step_log.readers else []
        engine.observers.extend([*observers, *logs, *found])
    except BaseException:
        executor.close()  # it may hold other processes
        raise
    if tracking is not None:
        tracking.run = run  # type: ignore[attr-defined]
        engine.observers.append(tracking)  # type: ignore[arg-type]
    return run


def with_slo(arrivals: Iterable[Arrival], slo: SLO) -> Iterable[Arrival]:
    """Applies the run's default SLO to requests that have none. A list stays a list: the engine sorts it by time."""
    none = SLO()
    given = (replace(a, slo=slo) if isinstance(a, Arrival) and a.slo == none and slo != none else a for a in arrivals)
    return list(given) if isinstance(arrivals, (list, tuple)) else given
