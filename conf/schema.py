"""From the plugin registry to Hydra and back: a typed config node for every plugin, and a Composition from a composed config.

A plugin's dataclass is the only source of its defaults. Its node is that dataclass plus `name`, so a misspelt parameter or a
value of the wrong type is refused when the config is composed.
"""

from __future__ import annotations

import copy
import typing
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.build import Composition
from core.config import EngineConfig, Hardware, ModelConfig, ParallelConfig, ResultsConfig
from core.errors import ConfigError, PluginError
from core.hooks import OPTIONAL, Broken, Registry
from core.policy import ROLES
from core.request import SLO

#: Root nodes that are no role, with their dataclasses.
NODES = {"engine": EngineConfig, "slo": SLO, "model": ModelConfig, "hardware": Hardware, "parallel": ParallelConfig, "results": ResultsConfig}
GROUP_ROLES = tuple(role for role in ROLES if role not in NODES)


@dataclass
class Absent:
    """The option `none` of a role that a run can do without."""

    name: str = "none"


def node(config: type, name: str | None = None) -> type:
    """A config schema with the fields of `config`, mutable and without its checks, plus `name` where one is given."""
    try:
        hints = typing.get_type_hints(config)
    except NameError as error:
        raise PluginError(f"{config.__module__}.{config.__qualname__}: {error}; import the types of its fields at run time") from error
    members: list[Any] = [("name", str, field(default=name))] if name is not None else []
    for parameter in fields(config):
        if parameter.init:
            default = copy.copy(parameter)
            default.kw_only = MISSING  # make_dataclass sets it
            members.append((parameter.name, _supported(hints[parameter.name]), default))
    return make_dataclass(config.__name__, members, kw_only=True)


def _supported(hint: Any) -> Any:
    """`hint` where OmegaConf can check it, else Any: unions of containers, Literal, sets."""
    try:
        OmegaConf.structured(make_dataclass("Probe", [("probe", hint, field(default=MISSING))], kw_only=True))
    except (OmegaConfBaseException, TypeError):
        return Any
    return hint


def register(registry: Registry) -> None:
    """Every plugin as an option of its role's group, and the root schema. A plugin that OmegaConf refuses becomes broken."""
    store = ConfigStore.instance()
    for (role, name), plugin in list(registry.plugins.items()):
        try:
            schema = node(plugin.config, name)
            OmegaConf.structured(schema)
        except (OmegaConfBaseException, PluginError, TypeError) as error:
            del registry.plugins[role, name]
            registry.broken.append(Broken(plugin.origin, f"its parameters are no config: {error}", role, name))
            continue
        store.store(group=role, name=name, node=schema, provider=f"headway:{plugin.origin.name}")
    for role in OPTIONAL:
        store.store(group=role, name="none", node=Absent, provider="headway")
    schemas = {name: node(config) for name, config in NODES.items()}
    store.store(group="parallel", name="mesh", node=schemas["parallel"], provider="headway")
    store.store(group="model", name="custom", node=schemas["model"], provider="headway")
    members: list[Any] = [("seed", int, field(default=0))]
    members += [(name, schema, field(default_factory=schema)) for name, schema in schemas.items()]
    members += [(role, Any, field(default=None)) for role in GROUP_ROLES]
    store.store(name="schema", node=make_dataclass("Schema", members), provider="headway")


def composition(cfg: DictConfig) -> Composition:
    """The run that a composed config describes. Raises ConfigError for values that a node refuses."""
    choices: dict[str, tuple[str, dict[str, Any]]] = {}
    for role in GROUP_ROLES:
        chosen = cfg[role]
        if chosen is None or (chosen.name == "none" and role in OPTIONAL):
            continue
        parameters = _values(chosen, ConfigStore.instance().load(f"{role}/{chosen.name}.yaml").node, f"{role}={chosen.name}")
        choices[role] = parameters.pop("name"), parameters
    root = ConfigStore.instance().load("schema.yaml").node
    nodes = {name: config(**_values(cfg[name], root[name], name)) for name, config in NODES.items()}
    return Composition(choices, seed=cfg.seed, **nodes)


def _values(given: DictConfig, schema: DictConfig, where: str) -> dict[str, Any]:
    """A node's values by name. The schema is merged in again because the config of an earlier run comes back as plain YAML."""
    try:
        return dict(vars(OmegaConf.to_object(OmegaConf.merge(schema, given))))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
