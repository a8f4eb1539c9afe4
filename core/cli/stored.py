"""A composed config as it is stored and sent: what comes from the environment may be a secret."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

SHORTEST = 6  # characters of a value worth hiding: shorter ones are no secrets, and stand everywhere

_read: list[str] = []  # names of the environment's variables, one entry per reading


def watch_environment() -> None:
    """From here on every `${oc.env:...}` that is resolved is known by its name."""

    def env(key: str, *default: Any) -> Any:
        _read.append(key)
        return oc.env(key, *default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)


def stored(cfg: DictConfig) -> dict[str, Any]:
    """As plain data, resolved but for what depends on the environment, however indirectly."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    return {str(key): _value(cfg, key, raw[key]) for key in raw}


def _value(parent: DictConfig | ListConfig, key: Any, raw: Any) -> Any:
    if OmegaConf.is_missing(parent, key):
        return raw
    if OmegaConf.is_interpolation(parent, key):
        before = len(_read)
        value: Any = parent[key]
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        return raw if len(_read) > before or "${" in str(plain) else plain
    if isinstance(raw, dict):
        return {name: _value(parent[key], name, raw[name]) for name in raw}
    if isinstance(raw, list):
        return [_value(parent[key], n, item) for n, item in enumerate(raw)]
    return raw


def concealed() -> dict[str, str]:
    """The values that a config took from the environment, and how it names them."""
    taken = {os.environ.get(name, ""): f"${{oc.env:{name}}}" for name in dict.fromkeys(_read)}
    return {value: name for value, name in taken.items() if len(value) >= SHORTEST}


def hide(text: str) -> str:
    """`text` without the values that a config took from the environment."""
    for value, name in concealed().items():
        text = text.replace(value, name)
    return text
