"""All compositions of a sweep, checked before its first job: what is wrong is listed together, and nothing
has run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ..compose.build import Composition, check
from ..compose.hooks import Registry
from ..errors import ConfigError, HeadwayError
from . import schema
from .explain import explain

Compose = Callable[[Sequence[str]], DictConfig]
#: What a composition is made of; an override `order.wp=2` changes the part `order` and no other.
PARTS = (*schema.GROUP_ROLES, *schema.NODES, "seed")


@dataclass
class Sweeper(BasicSweeperConf):
    """Node of the option `hydra/sweeper=basic`, which every config has unless it names another."""

    _target_: str = "hydra_plugins.headway_sweeper.CheckedSweeper"


_registry: list[Registry] = []  # Hydra makes a sweeper from plain data, which cannot hold it


def register(registry: Registry) -> None:
    """From now on `--multirun` checks every composition first, whatever config is run."""
    _registry[:] = [registry]
    Plugins.instance()  # its discovery registers Hydra's own option of this name
    ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=Sweeper, provider="headway")


def check_jobs(jobs: Sequence[Sequence[str]], compose: Compose) -> None:
    """Raises ConfigError that lists what is wrong with any of the jobs, a line for each reason."""
    print(f"checking {len(jobs)} compositions", flush=True)
    (registry,) = _registry
    parts = Parts(compose, registry)
    wrong: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        try:
            check(registry, parts.composition(job))
        except HeadwayError as error:
            wrong.setdefault(str(error), []).append(number)
    if wrong:
        count = sum(map(len, wrong.values()))
        lines = [f"  {_numbered(numbers)}: {reason}" for reason, numbers in wrong.items()]
        raise ConfigError("\n".join([f"{count} of {len(jobs)} jobs cannot run, so none was started", *lines]))


def _numbered(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"job{'s' if len(numbers) > 1 else ''} {shown}{more}"


class Parts:
    """Compositions of jobs that share most of what they are made of.

    Hydra needs 0.1 s for a composition, whatever it holds, so 96 jobs would take 10 s. A part is remembered
    by the overrides that can change it: those of its own name, and those that belong to no part (policy=,
    experiment=). Hydra is asked about a job only when it has a part that no job before it had; three
    schedulers times four caches are six questions.
    """

    def __init__(self, compose: Compose, registry: Registry) -> None:
        self._compose, self._registry = compose, registry
        # a part's name and its overrides -> its value, or the ConfigError
        self._known: dict[tuple[str, ...], Any] = {}

    def composition(self, job: Sequence[str]) -> Composition:
        """Raises ConfigError in plain words for what Hydra or a config node refuses."""
        keys = {part: self._key(part, job) for part in PARTS}
        for own in keys["seed"][1:]:  # often a new one in every job, and nobody need ask what 7 is
            number = own.removeprefix("seed=")
            if number.isdecimal():
                self._known[keys["seed"]] = int(number)
        self._raise_known(keys)
        if not all(key in self._known for key in keys.values()):
            self._ask(job, keys)
            self._raise_known(keys)
        found = {part: self._known[key] for part, key in keys.items()}
        choices = {role: found.pop(role) for role in schema.GROUP_ROLES}
        return Composition({role: choice for role, choice in choices.items() if choice is not None}, **found)

    def _key(self, part: str, job: Sequence[str]) -> tuple[str, ...]:
        own = tuple(override for override in job if _part_of(override) == part)
        if part == "seed" and own:  # a number of its own, so nothing else can have a say
            return part, *own
        return part, *own, *(override for override in job if not _part_of(override))

    def _raise_known(self, keys: dict[str, tuple[str, ...]]) -> None:
        for key in keys.values():
            if isinstance(refusal := self._known.get(key), ConfigError):
                raise refusal

    def _ask(self, job: Sequence[str], keys: dict[str, tuple[str, ...]]) -> None:
        try:
            made = schema.composition(self._compose(job))
        except (HydraException, OmegaConfBaseException) as error:
            self._refuse(explain(error, self._registry, job), keys)
        except ConfigError as error:
            self._refuse(str(error), keys)
        else:
            values = made.choices | {
                f.name: getattr(made, f.name) for f in fields(made) if f.name != "choices"
            }
            self._known |= {key: values.get(part) for part, key in keys.items()}

    def _refuse(self, reason: str, keys: dict[str, tuple[str, ...]]) -> None:
        """Remembers a refusal with the part that it names, so that it is found once and not in every job that
        has the part."""
        named = re.match(r"\w+", reason)
        part = named.group() if named else ""
        if part not in keys:
            raise ConfigError(reason)
        self._known[keys[part]] = ConfigError(reason)


def _part_of(override: str) -> str:
    """The part that an override changes, "" where it may change any."""
    name = re.match(r"[+~]*(\w+)", override)
    return name.group(1) if name and name.group(1) in PARTS else ""


def loosened(arguments: Sequence[str]) -> list[str]:
    """`workload=azure,mooncake workload.path=FILE` with the parameter as `++workload.path=FILE`.

    Hydra composes a sweep once before its jobs, with the default of every group that is swept, and refuses a
    parameter that this default lacks. `++` defers the question to the jobs, whose nodes know their
    parameters.
    """
    values = dict(argument.partition("=")[::2] for argument in arguments)
    swept = {
        group for group in schema.GROUP_ROLES if re.search(r",|\b(choice|glob)\(", values.get(group, ""))
    }
    return [
        f"++{a}"
        if "=" in a and a.partition("=")[0].partition(".")[::2][1] and a.partition(".")[0] in swept
        else a
        for a in arguments
    ]
