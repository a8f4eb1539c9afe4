"""The wiring: pluggy hook specifications, discovery, and the registry of what can be chosen.

A pluggy call costs about 1 us and a bound method 20 ns, so pluggy finds and registers; the engine calls
objects directly. Installing a package makes its plugins available, never active. What is broken is listed
with its reason and stops only the run that asks for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from .. import keyed, policy
from ..errors import ConfigError, HeadwayError, PluginError, near
from ..outside import Observer
from ..policy import API_VERSION, ROLES, Role
from ..renamed import renamed
from .params import checked

if TYPE_CHECKING:
    from ..loop import Loop
    from ..outputs import RunResult
    from .build import Run

PROJECT = "headway"
# comma-separated plugin names to leave out; "*" leaves out every installed package
BLOCK = "HEADWAY_PLUGINS_BLOCK"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

#: Roles that a run can do without: `chunk=none`.
OPTIONAL = ("chunk", "admission", "predictor", "retention", "tracking")
ROLE_CLASSES: dict[str, type[Role]] = {
    c.role: c
    for c in vars(policy).values()
    if isinstance(c, type) and issubclass(c, Role) and "role" in vars(c)
}
ROLE_CLASSES["tracking"] = Observer


class HeadwaySpec:
    """The hooks. A plugin module implements any of them with `@hookimpl`; each is called once per process or
    once per run."""

    @hookspec
    def headway_register(self, registry: Registry) -> None:
        """Add plugins: `registry.add(role, name, factory)`."""

    @hookspec
    def headway_observers(self, run: Run) -> Sequence[Observer]:  # type: ignore[empty-body]
        """Observers that watch every run while the package is installed. Called once per run, after its roles
        are built."""

    @hookspec
    def headway_stand_in(self, run: Run) -> Loop | str:  # type: ignore[empty-body]
        """What can go through this very run in its engine's place, to the same outcome; or why it cannot."""

    @hookspec
    def headway_run_start(self, run: Run) -> None:
        """The engine is built and the first request has not arrived."""

    @hookspec
    def headway_run_end(self, run: Run, result: RunResult) -> None:
        """The run is over: finished, interrupted or failed (`result.status`). Observers have written their
        files."""


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from: an in-tree file, or an installed distribution with its version."""

    name: str  # "schedulers.fcfs", or the entry point's name
    source: str  # path of the file, or module of the entry point
    dist: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"{self.dist} {self.version} ({self.source})" if self.dist else self.source


@dataclass(frozen=True)
class Plugin:
    """One choice for one role."""

    role: str
    name: str
    factory: Callable[..., Any]
    config: type  # the dataclass whose fields are the parameters
    summary: str
    origin: Origin

    @property
    def differs(self) -> str:
        """What it is not: see `said_to_differ`."""
        return said_to_differ(self.config.__doc__ or "")

    def parameters(self) -> list[dataclasses.Field[Any]]:
        return [f for f in dataclasses.fields(self.config) if f.init]

    def build(self, **parameters: Any) -> Any:
        """The object, from parameters by name; what is left out takes the dataclass's default.

        Raises ConfigError that names `role.parameter=value` for one that is not what its declaration says.
        """
        parameters = checked(self.config, parameters, self.role)
        if self.config is self.factory:
            return self.factory(**parameters)
        return self.factory(self.config(**parameters))


@dataclass(frozen=True)
class Broken:
    """Something that could not be registered. `role` and `choice` are known when it got as far as
    `registry.add`."""

    origin: Origin
    reason: str
    role: str = ""
    choice: str = ""

    def concerns(self, role: str, name: str) -> bool:
        if self.role:
            return (self.role, self.choice) == (role, name)
        return name in (self.origin.name, self.origin.name.rpartition(".")[2])


class Registry:
    """Every available plugin by role and name, and what is broken."""

    def __init__(self) -> None:
        self.plugins: dict[tuple[str, str], Plugin] = {}
        self.broken: list[Broken] = []
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(HeadwaySpec)
        self._origin = Origin("test", "registered by hand")
        self._origins: dict[str, Origin] = {}  # of what was registered, by name

    # ---- what a plugin calls ------------------------------------------------------------------------------

    def add(self, role: str, name: str, factory: Callable[..., Any], config: type | None = None) -> None:
        """Makes `role=name` choosable. `factory` is a dataclass role class, or a function that takes
        `config`, a dataclass.

        Raises PluginError for an unknown role, a taken name, a class that is no dataclass or lacks a method
        of its role.
        """
        role = renamed(role)
        shown: Any = config or factory
        plugin = Plugin(role, name, factory, shown, summary=_summary(factory, config), origin=self._origin)
        try:
            self._check(plugin)
        except PluginError as error:
            self.broken.append(Broken(self._origin, str(error), role, name))
            raise
        self.plugins[role, name] = plugin

    def _check(self, plugin: Plugin) -> None:
        role, name, factory, config = plugin.role, plugin.name, plugin.factory, plugin.config

        def refuse(reason: str) -> PluginError:
            return PluginError(f"{role}={name} ({plugin.origin}, {_file(factory)}): {reason}")

        if role not in ROLES:
            raise refuse(f"there is no role {role!r}.{near(role, ROLES)}")
        if not name.replace("-", "_").isidentifier() or (name == "none" and role in OPTIONAL):
            raise refuse(
                f"{name!r} cannot be chosen on a command line: use letters, digits and _ (and not 'none')"
            )
        if other := self.plugins.get((role, name)):
            raise PluginError(
                f"{role}={name} is registered twice, by {other.origin} and by {plugin.origin}: "
                f"rename one, or leave one out with {BLOCK}={plugin.origin.name}"
            )
        api = max(getattr(factory, "api", 1), getattr(config, "api", 1))
        if api > API_VERSION:
            raise refuse(
                f"needs plugin API {api}, this Headway has {API_VERSION}: update Headway, or install an "
                f"older {plugin.origin.name}"
            )
        if not isinstance(config, type):
            raise refuse(
                "a function needs the dataclass of its parameters: registry.add(role, name, function, Config)"
            )
        if "__dataclass_fields__" not in vars(config):
            raise refuse(f"its parameters are no dataclass: put @dataclass above class {config.__name__}")
        for parameter in plugin.parameters():
            if parameter.name == "name":
                raise refuse(
                    "a parameter may not be called 'name': that key holds the plugin's own name in a config"
                )
            if problem := _default_problem(parameter):
                raise refuse(f"the default of its parameter {parameter.name} cannot be made: {problem}")
        try:
            known = {f.name: f.default for f in plugin.parameters()}
            checked(
                config,
                {name: value for name, value in known.items() if value is not dataclasses.MISSING},
                role,
            )
        except ConfigError as error:
            raise refuse(f"a default is not what its declaration says: {error}") from error
        base = ROLE_CLASSES.get(role)
        if isinstance(factory, type) and base:
            if not issubclass(factory, base):
                raise refuse(
                    f"{factory.__name__} is no {base.__name__}: derive it from headway.{base.__name__}"
                )
            if missing := _missing(factory, base):
                raise refuse(
                    f"{factory.__name__} lacks {', '.join(missing)}: every {base.__name__} has it, see "
                    "core/policy.py"
                )

    # ---- what a run calls ---------------------------------------------------------------------------------

    def names(self, role: str) -> list[str]:
        return sorted(name for r, name in self.plugins if r == role)

    def get(self, role: str, name: str) -> Plugin:
        """The plugin behind `role=name`. Raises PluginError if it is broken, ConfigError with the near names
        if there is none."""
        role = renamed(role)
        for broken in self.broken:
            if broken.concerns(role, name) and (broken.role or (role, name) not in self.plugins):
                raise PluginError(f"{role}={name} cannot be used: {broken.reason}")
        if plugin := self.plugins.get((role, name)):
            return plugin
        if role not in ROLES:
            raise ConfigError(f"there is no role {role!r}.{near(role, ROLES)}")
        hint = (
            f" ({len(self.broken)} plugins are broken; `python -m headway plugins` says why)"
            if self.broken
            else ""
        )
        raise ConfigError(f"{role}={name}: there is no such {role}.{near(name, self.names(role))}{hint}")

    def observers(self, run: Run) -> list[Observer]:
        """What every `headway_observers` hook answers, in the order of registration."""
        found: list[Observer] = []
        for name, answer in self.call("headway_observers", run=run):
            if not isinstance(answer, (list, tuple)):
                raise PluginError(
                    f"plugin {name}: headway_observers answered {answer!r}: expected a list of observers"
                )
            found += answer
        return found

    def call(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """(plugin's name, what it answers) of each that implements the hook, in the order of registration;
        None is left out.

        One after the other, so that an exception is known to be that plugin's: it is raised as a PluginError
        with its name."""
        implementations = getattr(self.manager.hook, hook).get_hookimpls()
        answers = []
        for one in implementations:
            caller = self.manager.subset_hook_caller(
                hook, [other.plugin for other in implementations if other is not one]
            )
            try:
                answers += [(one.plugin_name, answer) for answer in caller(**arguments)]
            except HeadwayError:
                raise
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"plugin {one.plugin_name}: {hook} raised {type(error).__name__}: {error}"
                ) from error
        return answers

    # ---- discovery ----------------------------------------------------------------------------------------

    def register(self, module: object, origin: Origin) -> None:
        """Registers one module's hooks and lets it add its plugins; whatever goes wrong is recorded, not
        raised."""
        known = len(self.broken)
        try:
            if (taken := self._origins.setdefault(origin.name, origin)) is not origin:
                raise PluginError(
                    f"{origin} and {taken} are both called {origin.name}, and the first one is used"
                )
            self.manager.register(module, origin.name)
            for caller in self.manager.get_hookcallers(module) or ():
                if not caller.has_spec():
                    hooks = [n for n in vars(HeadwaySpec) if n.startswith("headway_")]
                    raise PluginError(
                        f"{origin} implements the unknown hook {caller.name}.{near(caller.name, hooks)}"
                    )
            if (function := getattr(module, "headway_register", None)) is not None:
                self._origin = origin
                function(self)
        except (Exception, SystemExit) as error:
            if len(self.broken) == known:  # `add` records its own
                self.broken.append(Broken(origin, f"{type(error).__name__}: {error}"))
            if self.manager.is_registered(module):
                self.manager.unregister(module)

    def discover(self) -> None:
        """In-tree plugins by walking the `plugins` package, others through the entry-point group
        `headway`."""
        blocked = {name.strip() for name in os.environ.get(BLOCK, "").split(",")}
        for name in _in_tree():
            short = name.removeprefix("plugins.")
            if short not in blocked:
                self._load(Origin(short, name.replace(".", "/")), partial(importlib.import_module, name))
        points = [
            (_origin(point), point)
            for point in sorted(entry_points(group=PROJECT), key=lambda p: (p.name, p.value))
            if not {"*", point.name, point.dist.name if point.dist else ""} & blocked
        ]
        for origin, point in points:
            if rivals := [other for other, _ in points if other.name == origin.name and other is not origin]:
                names = " and ".join(map(str, sorted((origin, *rivals), key=str)))
                reason = (
                    f"{names} are both called {origin.name}, and neither is used: leave one out with "
                    f"{BLOCK}=its package's name"
                )
                self.broken.append(Broken(origin, reason))
            else:
                self._load(origin, point.load)

    def _load(self, origin: Origin, load: Callable[[], Any]) -> None:
        try:
            module = load()
        except BaseException as error:  # a plugin may even call sys.exit while it is imported
            if isinstance(error, KeyboardInterrupt):
                raise
            self.broken.append(Broken(origin, f"import failed: {type(error).__name__}: {error}"))
            return
        self.register(
            module, dataclasses.replace(origin, source=origin.source if origin.dist else _relative(module))
        )


def load_registry() -> Registry:
    """All that is there, in-tree and installed."""
    registry = Registry()
    registry.discover()
    return registry


def _in_tree() -> Iterator[str]:
    """Modules of `plugins` that hold hooks. Siblings that hold none may be heavy (torch) and are not
    imported."""
    import plugins

    pending = [(list(plugins.__path__), "plugins.")]
    while pending:
        path, prefix = pending.pop(0)
        for found in sorted(pkgutil.iter_modules(path, prefix), key=lambda m: m.name):
            folder = Path(found.module_finder.path)  # type: ignore[union-attr]
            stem = found.name.rpartition(".")[2]
            file = folder / stem / "__init__.py" if found.ispkg else folder / f"{stem}.py"
            if file.exists() and b"@hookimpl" in file.read_bytes():
                yield found.name
            elif found.ispkg:
                pending.append(([str(folder / stem)], f"{found.name}."))


def _origin(point: EntryPoint) -> Origin:
    return Origin(
        point.name,
        point.value,
        point.dist.name if point.dist else "unknown package",
        point.dist.version if point.dist else "",
    )


def _default_problem(parameter: dataclasses.Field[Any]) -> str:
    """Why the default of a parameter cannot be had, "" if it can: listings and configs ask for it, and one
    bad plugin must not stop them."""
    if parameter.default_factory is dataclasses.MISSING:
        return ""
    try:
        parameter.default_factory()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _relative(module: Any) -> str:
    file = Path(module.__file__)
    root = Path(__file__).resolve().parents[2]
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _file(factory: Any) -> str:
    try:
        return f"{inspect.getsourcefile(factory)}:{inspect.getsourcelines(factory)[1]}"
    except (OSError, TypeError):
        return getattr(factory, "__module__", "?")


def _summary(factory: Any, config: type | None) -> str:
    doc = inspect.cleandoc(factory.__doc__ or getattr(config, "__doc__", None) or "")
    first = doc.partition("\n\n")[0].replace("\n", " ")
    # dataclass's made-up docstring
    return "" if first.startswith(f"{getattr(config or factory, '__name__', '')}(") else first


def said_to_differ(doc: str) -> str:
    """The sentences of a docstring that say what is missing or other than in the paper: those that begin with
    "Differs" or "Not here"."""
    found = []
    for paragraph in inspect.cleandoc(doc).split("\n\n")[1:]:
        text = " ".join(paragraph.split())
        found += re.findall(r"(?:^|(?<=[.:;] ))((?:Differs|Not here)\b.*?\.)(?= [A-Z`]|$)", text)
    return " ".join(found)


_CORE = (policy.__name__, keyed.__name__)  # where the roles' base classes are


def _missing(factory: type, base: type) -> list[str]:
    """Methods of the role that raise NotImplementedError still."""
    names = [n for c in factory.__mro__ if issubclass(c, base) and c.__module__ in _CORE for n in vars(c)]
    functions = ((n, inspect.getattr_static(factory, n)) for n in dict.fromkeys(names))
    return [
        f"{n}()"
        for n, f in functions
        if inspect.isfunction(f) and "NotImplementedError" in f.__code__.co_names and f.__module__ in _CORE
    ]
