"""From names and parameters to a running system, in plain Python: what `run.py`, `headway.LLM` and the
conformance kit share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import ConfigError, HeadwayError, PluginError, WorkloadError, near
from ..execution import ExecutorCaps
from ..executor import BuildContext, Executor
from ..inputs import SLO, Arrival
from ..loop import Loop
from ..loop import run as whole_run
from ..measure.step_log import StepLog
from ..outputs import RunResult
from ..outside import Observer, Workload
from ..policy import SERVICES, Role
from ..renamed import with_names_of_today
from ..roles import check_limits
from .config import EngineConfig, Hardware, ModelConfig, ParallelConfig, ResultsConfig
from .facts import facts
from .hooks import Plugin, Registry
from .params import check as check_values
from .params import checked, param


@dataclass
class Composition:
    """One run as data: a (name, parameters) pair per role, and the nodes that belong to no role."""

    choices: dict[str, tuple[str, dict[str, Any]]]
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: Hardware = field(default_factory=Hardware)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    slo: SLO = field(default_factory=SLO)  # for requests that bring none
    results: ResultsConfig = field(default_factory=ResultsConfig)
    # value that nothing may store -> how the config names it
    concealed: dict[str, str] = field(default_factory=dict)
    seed: int = param(0, min=-(2**63), max=2**63 - 1)

    def __post_init__(self) -> None:
        self.choices = with_names_of_today(self.choices)
        self.seed = checked(type(self), {"seed": self.seed}, "")["seed"]


@dataclass
class Run:
    """A built run. Hooks and observers get it; `directory` is where they may write, None where nothing is to
    be written."""

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
        """Runs the workload to its end, once. Interrupts give a partial result; errors are raised with it as
        `partial`."""
        if self._executed:
            raise ConfigError(
                "this run was executed before, and its executor is closed: build another from the same "
                "composition"
            )
        self._executed = True
        engine, slo = self.engine, self.composition.slo
        workload: Any = self.roles["workload"]
        try:
            loop = self.loop()
            seed, vocab_size = self.composition.seed, engine.executor.caps.vocab_size
            arrivals = engine.calls.call(workload, workload.arrivals, seed, vocab_size, engine.max_model_len)
            if not hasattr(arrivals, "__iter__"):
                raise WorkloadError(
                    f"{workload.plugin_name}: arrivals() answered {arrivals!r}: expected an iterable of "
                    "Arrivals"
                )
            self.registry.call("headway_run_start", run=self)
            result = whole_run(
                loop,
                with_slo(arrivals, slo),
                lambda request, now: with_slo(workload.on_result(request, now), slo),
            )
        except BaseException as error:
            if (partial := getattr(error, "partial", None)) is not None:
                self._tell_end(partial, error)
            raise
        finally:
            engine.executor.close()
        self._tell_end(result)
        return result

    def loop(self) -> Loop:
        """What goes through the run: the engine, or what stands in for it with the same outcome. Raises
        ConfigError for engine.native=always where nothing can."""
        native = self.composition.engine.native
        if native == "never":
            return self.engine
        answers = [answer for _, answer in self.registry.call("headway_stand_in", run=self)]
        reasons = [answer for answer in answers if isinstance(answer, str)]
        loops = [answer for answer in answers if not isinstance(answer, str)]
        if native == "always" and not loops:
            why = "; ".join(reasons) or "nothing stands in for the engine"
            raise ConfigError(f"engine.native=always: {why}. Set engine.native=auto")
        return loops[0] if loops else self.engine

    def _tell_end(self, result: RunResult, error: BaseException | None = None) -> None:
        """The hooks at the end. What one of them raises carries the result, and never takes the place of the
        run's own error."""
        try:
            self.registry.call("headway_run_end", run=self, result=result)
        except HeadwayError as late:
            if error is None:
                late.partial = result  # type: ignore[attr-defined]
                raise
            error.add_note(str(late))


def build_roles(
    registry: Registry, choices: dict[str, tuple[str, dict[str, Any]]]
) -> tuple[dict[str, Role], dict[str, Plugin]]:
    """One object per role; roles that name the same factory share one object, with the parameters of the node
    that gives them.

    Raises ConfigError for names, parameters and values that cannot be, PluginError for a chosen plugin that
    is broken.
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


def _merge(
    plugins: dict[str, Plugin], choices: dict[str, tuple[str, dict[str, Any]]], together: list[str]
) -> dict[str, Any]:
    """Parameters of one object that several nodes describe: what differs from the default was given by
    somebody."""
    merged: dict[str, Any] = {}
    given: dict[str, str] = {}
    for role in together:
        plugin = plugins[role]
        known = {f.name: f for f in plugin.parameters()}
        for name, value in choices[role][1].items():
            if name not in known:
                raise ConfigError(
                    f"{role}.{name}: {role}={plugin.name} has no such parameter.{near(name, known)}"
                )
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
        message = (
            f"{plugin.role}={plugin.name} called sys.exit({error.code}) while it was built: raise an error "
            "instead"
        )
        raise PluginError(message) from error
    return built


def _context(registry: Registry, composition: Composition, roles: dict[str, Role]) -> BuildContext:
    def executor_named(name: str) -> Executor:
        built: Executor = _construct(registry.get("executor", name), {})  # type: ignore[assignment]
        built.plugin_name = f"executor={name}"
        _check_ranks(registry, built, composition)
        return built

    return BuildContext(
        model=composition.model,
        hardware=composition.hardware,
        engine=composition.engine,
        parallel=composition.parallel,
        seed=composition.seed,
        kernels=roles.get("kernels"),
        kernels_named=lambda name: _construct(registry.get("kernels", name), {}),
        executor_named=executor_named,
        facts=lambda: facts(registry, composition),
    )


def _check_ranks(registry: Registry, executor: Executor, composition: Composition) -> None:
    parallel = composition.parallel
    if parallel.world_size > 1 and not executor.several_ranks:
        given = f"parallel.tp={parallel.tp} parallel.pp={parallel.pp}"
        one = f"{executor.plugin_name} runs on one rank; more is not there yet"
        factories = {name: registry.plugins["executor", name].factory for name in registry.names("executor")}
        able = [name for name, factory in factories.items() if getattr(factory, "several_ranks", False)]
        other = f", or executor to one of {', '.join(able)}" if able else ""
        raise ConfigError(f"{given}: {one}. Set both to 1{other}")


def prepare_executor(
    registry: Registry, executor: Executor, composition: Composition, roles: dict[str, Role]
) -> Executor:
    """Who runs the plans, ready to."""
    built = executor.build(_context(registry, composition, roles))
    built.plugin_name = built.plugin_name or executor.plugin_name
    if getattr(built, "caps", None) is None:
        raise ConfigError(
            f"{built.plugin_name} has no caps: set them (ExecutorCaps) when it is made, or in build(context)"
        )
    return built


def check(registry: Registry, composition: Composition) -> tuple[dict[str, Role], dict[str, Plugin]]:
    """The roles of a run and their plugins, after everything that can be known without weights, ranks or a
    pool of blocks.

    `build` begins with it, and a sweep asks it about every job before the first one runs. Raises HeadwayError
    for names, parameters and their ranges, services that a role requires, files, and limits that the executor
    cannot keep.
    """
    for node in ("engine", "model", "hardware", "parallel", "slo"):
        check_values(getattr(composition, node), node)  # whatever was set on them since they were made
    roles, plugins = build_roles(registry, composition.choices)
    for role in roles.values():
        if "predictor" in role.requires and "predictor" not in roles:
            names = registry.names("predictor")
            known = (
                f"set predictor={', '.join(names[:-1])} or {names[-1]}"
                if len(names) > 1
                else SERVICES["predictor"]
            )
            raise ConfigError(f"{role.plugin_name} needs a predictor, and none is chosen: {known}")
    workload: Any = roles.get("workload")
    if isinstance(workload, Workload):
        workload.check()
    _check_targets(roles, composition.slo)
    executor: Executor = roles["executor"]  # type: ignore[assignment]
    _check_ranks(registry, executor, composition)
    if (caps := executor.check(_context(registry, composition, roles))) is not None:
        _check_limits(executor, caps, _limited(registry, composition, roles), roles)
    return roles, plugins


def _check_targets(roles: dict[str, Role], slo: SLO) -> None:
    """Raises ConfigError for a policy that goes by latency targets where no request can have one: it would
    silently do nothing.
    """
    # a workload without the parameter may bring targets of its own
    tiers = getattr(roles.get("workload"), "slo_tiers", slo)
    if slo == SLO() and not tiers:
        for role in roles.values():
            if "slo" in role.requires:
                raise ConfigError(
                    f"{role.plugin_name} goes by latency targets, and no request has any: {SERVICES['slo']}"
                )


def _check_limits(
    executor: Executor, caps: ExecutorCaps, composition: Composition, roles: dict[str, Role]
) -> None:
    limits = _limits(composition)
    check_limits(limits, caps, executor.plugin_name)
    for role in roles.values():
        if "step_time" in role.requires and executor.cost_model is None:
            raise ConfigError(
                f"{role.plugin_name} needs step_time, and none is chosen: {SERVICES['step_time']}"
            )


def _limited(registry: Registry, composition: Composition, roles: dict[str, Role]) -> Composition:
    """The composition with the limits that its executor takes from elsewhere."""
    executor: Executor = roles["executor"]  # type: ignore[assignment]
    return replace(composition, engine=executor.limits(_context(registry, composition, roles)))


def _limits(composition: Composition) -> EngineConfig:
    """A stage without a plan of its own idles, so a pipeline has at least as many in flight as it has stages.
    Where none is given, the executor says so."""
    given = composition.engine.max_inflight
    return replace(
        composition.engine, max_inflight=None if given is None else max(given, composition.parallel.pp)
    )


def build(
    registry: Registry, composition: Composition, observers: Iterable[Observer] = (), **about: Any
) -> Run:
    """A run that is ready to `execute`. `about`: directory, config, overrides and group of the Run.

    Errors come in the order of their cost: names and parameters first, the checkpoint last.
    """
    roles, plugins = check(registry, composition)
    composition = _limited(registry, composition, roles)
    tracking = roles.pop("tracking", None)
    executor = prepare_executor(registry, roles["executor"], composition, roles)  # type: ignore[arg-type]
    roles["executor"] = executor
    try:
        engine = Engine(roles, _limits(composition), seed=composition.seed, stop_text=executor.stop_text)
        run = Run(composition, roles, plugins, engine, registry=registry, **about)
        found = registry.observers(run)
        logs = [run.step_log] if run.step_log.readers else []
        engine.observers.extend([*observers, *logs, *found])
    except BaseException:
        executor.close()  # it may hold other processes
        raise
    if isinstance(tracking, Observer):
        tracking.on_build(run)
        engine.observers.append(tracking)
    if composition.engine.native == "always":
        try:
            run.loop()
        except BaseException:
            executor.close()
            raise
    return run


def with_slo(arrivals: Iterable[Arrival], slo: SLO) -> Iterable[Arrival]:
    """Applies the run's default SLO to requests that have none. A list stays a list: the engine sorts it by
    time."""
    none = SLO()
    given = (
        replace(a, slo=slo) if isinstance(a, Arrival) and a.slo == none and slo != none else a
        for a in arrivals
    )
    return list(given) if isinstance(arrivals, (list, tuple)) else given
