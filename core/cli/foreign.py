"""Configs from outside this checkout: they say what is run, never how it is launched.

Hydra makes whatever its own node names: log files, callbacks, launchers, sweepers with all that is nested in
them. A run's folder may come from anybody, so what is read from one is data, and that node comes from conf/
and the command line alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from ..errors import ConfigError
from ..interrupts import say
from ..renamed import with_names_of_today

SAVED = "saved"  # the name under which the config of an earlier run is composed
HYDRA = "hydra"


def load(folder: Path, name: str, conf: Path) -> None:
    """Makes a run's config (-cp DIR/.hydra -cn config) composable as `saved`. Raises ConfigError."""
    file = folder / f"{name.removesuffix('.yaml')}.yaml"
    data = with_names_of_today({str(key): value for key, value in _read(file).items()})
    if "defaults" in data:
        raise ConfigError(f"{file}: has a `defaults` list, which no run's config has. For groups use -cd DIR")
    for key in [key for key in data if _is_hydras(key)]:
        del data[key]
        say(f"warning: {file}: `{key}` is ignored: it says how to launch a run, not what it is", error=True)
    own: Any = OmegaConf.load(conf / "config.yaml")
    defaults = ["schema", {"override hydra/job_logging": "none"}, "_self_"]
    node = {"defaults": defaults, HYDRA: own.hydra, **data}
    ConfigStore.instance().store(name=SAVED, node=node, provider="headway")


def vet(folder: Path) -> None:
    """Raises ConfigError for a file below `folder` (-cd DIR) that sets Hydra up, but for a sweep's values."""
    for file in _yaml_files(folder):
        data = _read(file)
        package = re.search(r"@package\s+(\S+)", file.read_text(encoding="utf-8"))
        wrong = [str(key) for key in data if _is_hydras(key) and key != HYDRA]
        wrong += [f"hydra.{key}" for key in _not_of_a_sweep(data.get(HYDRA))]
        wrong += [str(entry) for entry in data.get("defaults") or () if HYDRA in str(entry)]
        if file.relative_to(folder).parts[0] == HYDRA or (package and HYDRA in package[1]):
            wrong.append("its place in Hydra's own node")
        if wrong:
            raise ConfigError(
                f"{file}: {', '.join(wrong)}: a config from elsewhere may say what is run, but not how Hydra "
                "launches it. Give that on the command line"
            )


def _not_of_a_sweep(node: Any) -> Iterator[str]:
    """What an experiment may not say of Hydra; it may say that it is a sweep, and over what."""
    if node is None:
        return
    if not isinstance(node, dict):
        yield str(node)
        return
    for key, value in node.items():
        if key == "sweeper" and isinstance(value, dict) and isinstance(value.get("params"), dict):
            yield from (f"sweeper.{name}" for name in value if name != "params")
            yield from (f"sweeper.params.{name}" for name in value["params"] if _is_hydras(name))
        elif key != "mode":
            yield str(key)


def _is_hydras(key: Any) -> bool:
    return re.split(r"[^\w]", str(key).lstrip("+~ "))[0] == HYDRA


def _read(file: Path) -> dict[Any, Any]:
    try:
        data: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # whatever a reader makes of a stranger's file
        raise ConfigError(f"{file}: cannot be read as a config: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds a {type(data).__name__}, expected a config")
    return data


def _yaml_files(folder: Path) -> Iterator[Path]:
    for path, _, names in os.walk(folder, followlinks=True):
        yield from (Path(path) / name for name in sorted(names) if name.endswith((".yaml", ".yml")))
