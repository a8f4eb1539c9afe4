"""From the plugin registry to Hydra and back: a typed config node for every plugin, and a Composition from a
composed config.

A plugin's dataclass is the only source of its defaults. Its node is that dataclass plus `name`, so a misspelt
parameter or a value of the wrong type is refused when the config is composed.
"""

from __future__ import annotations

import copy
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from ..compose.build import Composition
from ..compose.config import EngineConfig, Hardware, ModelConfig, ParallelConfig, ResultsConfig
from ..compose.defaults import CONF
from ..compose.hooks import OPTIONAL, Broken, Registry
from ..errors import ConfigError, PluginError, near
from ..inputs import SLO
from ..policy import ROLES
from ..renamed import renamed

#: Root nodes, which are there whatever is chosen, with their dataclasses. `register` puts the plugin's that
#: runs the ranks in place of the core's.
NODES: dict[str, type] = {
    "engine": EngineConfig,
    "slo": SLO,
    "model": ModelConfig,
    "hardware": Hardware,
    "parallel": ParallelConfig,
    "results": ResultsConfig,
}
GROUP_ROLES = tuple(role for role in ROLES if role not in NODES)


@dataclass
class Absent:
    """The option `none` of a role that a run can do without."""

    name: str = "none"


def node(config: type, name: str | None = None) -> type:
    """A config schema with the fields of `config`, mutable and without its checks, plus `name` where one is
    given."""
    try:
        hints = typing.get_type_hints(config)
    except NameError as error:
        raise PluginError(
            f"{config.__module__}.{config.__qualname__}: {error}; import the types of its fields at run time"
        ) from error
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
    """Every plugin as an option of its role's group, and the root schema. A plugin that OmegaConf refuses
    becomes broken."""
    store = ConfigStore.instance()
    for (role, name), plugin in list(registry.plugins.items()):
        if role in NODES:
            continue
        try:
            schema = closed_but_for_dicts(node(plugin.config, name))
        except (OmegaConfBaseException, PluginError, TypeError) as error:
            del registry.plugins[role, name]
            registry.broken.append(
                Broken(plugin.origin, f"its parameters are no config: {error}", role, name)
            )
            continue
        store.store(group=role, name=name, node=schema, provider=f"headway:{plugin.origin.name}")
    for role in OPTIONAL:
        store.store(group=role, name="none", node=Absent, provider="headway")
    if mesh := registry.plugins.get(("parallel", "mesh")):
        NODES["parallel"] = mesh.config
    schemas = {name: node(config) for name, config in NODES.items()}
    store.store(group="parallel", name="mesh", node=schemas["parallel"], provider="headway")
    store.store(group="model", name="custom", node=schemas["model"], provider="headway")
    members: list[Any] = [("seed", int, field(default=0))]
    members += [(name, schema, field(default_factory=schema)) for name, schema in schemas.items()]
    members += [(role, Any, field(default=None)) for role in GROUP_ROLES]
    store.store(name="schema", node=make_dataclass("Schema", members), provider="headway")


def closed_but_for_dicts(schema: type) -> DictConfig:
    """A node whose dictionaries take keys that their defaults lack (order.weights={c0: 2}), though Hydra
    closes what it composes."""
    made: DictConfig = OmegaConf.structured(schema)
    _open_dicts(made)
    return made


def _open_dicts(config: DictConfig) -> None:
    for key in config:
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, str(key)):
            continue
        child = config[key]
        if not isinstance(child, DictConfig):
            continue
        if OmegaConf.get_type(child) is dict:
            OmegaConf.set_struct(child, False)
        else:
            _open_dicts(child)


def options(group: str) -> list[str]:
    """What a group can be set to: the files of conf/, and what `register` has stored."""
    files = {p.stem for p in (CONF / group).glob("*.yaml")}
    stored = ConfigStore.instance().repo.get(group, {})
    return sorted(files | {name.removesuffix(".yaml") for name in stored})


def composed(words: Iterable[str]) -> DictConfig:
    """What `python run.py WORDS` composes, in any process; after `register`. Raises HydraException."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", [renamed(word) for word in words])


def composition(cfg: DictConfig) -> Composition:
    """The run that a composed config describes. Raises ConfigError for values that a node refuses."""
    choices: dict[str, tuple[str, dict[str, Any]]] = {}
    for role in GROUP_ROLES:
        chosen = cfg.get(role)
        if chosen is None and role not in OPTIONAL:
            raise ConfigError(
                f"{role}: none is chosen, and a run needs one. Type {role}=NAME.{near('', options(role))}"
            )
        if chosen is None or (chosen.name == "none" and role in OPTIONAL):
            continue
        if chosen.name not in (known := options(role)):
            raise ConfigError(
                f"{role}.name={chosen.name}: there is no such {role}.{near(str(chosen.name), known)}"
            )
        schema = ConfigStore.instance().load(f"{role}/{chosen.name}.yaml").node
        parameters = _values(chosen, schema, role, f"{role}={chosen.name}")
        choices[role] = parameters.pop("name"), parameters
    root = ConfigStore.instance().load("schema.yaml").node
    nodes = {
        name: config(**_values(cfg.get(name) or root[name], root[name], name, name))
        for name, config in NODES.items()
    }
    return Composition(choices, seed=cfg.seed, **nodes)


def _values(given: DictConfig, schema: DictConfig, node: str, owner: str) -> dict[str, Any]:
    """A node's values by name. The schema is merged in again because the config of an earlier run comes back
    as plain YAML."""
    try:
        return dict(vars(OmegaConf.to_object(OmegaConf.merge(schema, given))))
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = [str(name) for name in schema if name != "name"]
        raise ConfigError(no_such_parameter(f"{node}.{key}", owner, key, known)) from error
    except MissingMandatoryValue as error:
        name = str(error).split("missing mandatory value: ")[-1].split()[0]
        raise ConfigError(f"{node}.{name}: {owner} cannot do without it. Type {node}.{name}=VALUE") from error
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key or "")
        hint = typing.get_type_hints(OmegaConf.get_type(schema)).get(_root(key))
        raise ConfigError(no_such_value(f"{node}.{key}", OmegaConf.select(given, key), hint)) from error


# ---- what is wrong, in words -----------------------------------------------------------------------------

#: A parameter's type -> what a person would type.
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list, like [1,2]",
    tuple: "a list, like [1,2]",
    dict: "entries, like {a: 1, b: 2}",
}


def kind(hint: Any) -> str:
    """What a value of this type looks like on a command line; "" where nothing can be said."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple, dict) and (each := kind(arguments[-1])):
        return f"{KINDS[origin]}, each {each}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(kind, arguments))))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if hint is type(None):
        return "null"
    return KINDS.get(origin or hint, "")


def no_such_parameter(key: str, owner: str, name: str, known: Iterable[str]) -> str:
    return f"{key}: {owner} has no such parameter.{near(name, known)}"


def no_such_value(key: str, value: Any, hint: Any) -> str:
    """`scheduler.token_budget=abc: expected a whole number`."""
    return f"{key}={value}: expected {kind(hint) or 'another kind of value'}"


def _root(key: str) -> str:
    """A parameter's name out of the key of one of its entries: weights.c0, rates[1]."""
    return re.split(r"[.\[]", key, maxsplit=1)[0]
