"""From what a user typed to what Hydra is given: paths in plain spelling, the folder of a sweep, the config of an earlier run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from core.errors import ConfigError

SAVED = "saved"  # the name under which the config of an earlier run is composed
FOREIGN = ("hydra",)  # settings of the launcher, never of a run
_BRACKETS = "[]{}()"  # lists, mappings and functions in the grammar of overrides: what is wrong there is Hydra's to say
_MEANT_FOR_HYDRA = f"{_BRACKETS},'\"$=#"


def arguments(argv: list[str], conf: Path) -> tuple[list[str], Path | None]:
    """What Hydra is given for what the user typed, and the folder of a sweep where the user names it.

    `model=<path or hub id>` is no option of the group, so it becomes `model=custom model.name_or_path=...`, a list of them a sweep.
    Raises ConfigError for what can be none of the two.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing; `ending` prints
    typed = get_args_parser().parse_intermixed_args(argv)
    if typed.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun runs whatever its pickle says: run a config again with -cp DIR/.hydra -cn config")
    flags = [a for a in argv if a not in typed.overrides]  # Hydra's parser wants them before the overrides
    if typed.config_path is not None and (folder := _folder(typed.config_path, conf)) != conf:
        load_saved(folder, typed.config_name or "config", conf)
        flags += ["--config-path", str(conf), "--config-name", SAVED]
    given = [plain for argument in typed.overrides for plain in _in_hydras_words(argument, conf)]
    named = [_value(a) for a in given if a.startswith("hydra.sweep.dir=")]
    return flags + given, Path(named[-1]) if named and "${" not in named[-1] else None


def _in_hydras_words(argument: str, conf: Path) -> list[str]:
    key, equals, value = argument.partition("=")
    if not equals:
        return [argument]
    if key == "model":
        return _model(value, conf)
    if Path(value).exists() and any(c in value for c in _MEANT_FOR_HYDRA):
        return [f"{key}={_quoted(value)}"]
    folder = key in ("hydra.run.dir", "hydra.sweep.dir")  # one, whatever is in its name
    if (_parses(argument) and not (folder and "," in value)) or any(c in value for c in _BRACKETS):
        return [argument]
    values = [value] if folder else _listed(key, value)
    return [f"{key}={','.join(map(_quoted, values))}"]


def _model(value: str, conf: Path) -> list[str]:
    items = _listed("model", value)
    paths = [item for item in items if _is_path(item, conf)]
    if not paths:
        return [f"model={value}"]
    if others := [item for item in items if item not in paths]:
        raise ConfigError(
            f"model={value}: {', '.join(paths)} are checkpoints and {', '.join(others)} options of the group, which one sweep cannot "
            "mix: sweep over each kind by itself"
        )
    return ["model=custom", f"model.name_or_path={','.join(map(_quoted, paths))}"]


def _is_path(item: str, conf: Path) -> bool:
    return ("/" in item or Path(item).is_dir()) and not (conf / "model" / f"{item}.yaml").exists()


def _listed(key: str, value: str) -> list[str]:
    """The values of a sweep, or the only one. A comma belongs to the path that it is in, and so it does in quotes."""
    if any(c in value for c in "'\"(") and not Path(value).exists() and _parses(f"{key}={value}"):
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        items = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [value]
        return [_value(f"{key}={item}") for item in items]
    parts, listed = value.split(","), []
    while parts:
        longest = next((n for n in range(len(parts), 1, -1) if Path(",".join(parts[:n])).exists()), 1)
        listed.append(",".join(parts[:longest]))
        parts = parts[longest:]
    return [item for item in listed if item]


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _quoted(value: str) -> str:
    """One string in the grammar of Hydra's overrides."""
    return QuotedString(value, Quote.single).with_quotes()


def _value(argument: str) -> str:
    return str(OverridesParser.create().parse_override(argument).value())


# ---- the config of an earlier run ------------------------------------------------------------------------------------


def _folder(path: str, conf: Path) -> Path:
    """Relative to the working directory, or to run.py, where Hydra looks."""
    here = Path(path).resolve()
    return here if here.is_dir() else (conf.parent / path).resolve()


def load_saved(folder: Path, name: str, conf: Path) -> None:
    """Makes the config in a run's folder composable as `saved`: as data. It may come from anybody, and Hydra's own node can name
    log files, callbacks and launchers, which Hydra makes whatever they are; so that node is this checkout's."""
    file = folder / f"{name.removesuffix('.yaml')}.yaml"
    try:
        data: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # whatever a YAML reader makes of a stranger's file
        raise ConfigError(f"{file}: cannot be read ({error}). Expected the config of an earlier run: -cp DIR/.hydra -cn config") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds no config. Expected that of an earlier run: -cp DIR/.hydra -cn config")
    if "defaults" in data:
        raise ConfigError(f"{file}: has a `defaults` list, and the config of a run is composed already. For configs of your own use -cd DIR")
    for key in [key for key in data if str(key).partition("@")[0].partition(".")[0].partition("/")[0] in FOREIGN]:
        del data[key]
        print(f"warning: {file}: `{key}` is ignored: it says how to launch a run, and not what it is", file=sys.stderr)
    own: Any = OmegaConf.load(conf / "config.yaml")
    defaults = ["schema", {"override hydra/job_logging": "none"}, "_self_"]
    ConfigStore.instance().store(name=SAVED, node={"defaults": defaults, "hydra": own.hydra, **data}, provider="headway")
