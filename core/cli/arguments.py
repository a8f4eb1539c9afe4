"""From what a user typed to what Hydra is given: paths as they are spelt, and the folder of a sweep."""

from __future__ import annotations

import os
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from ..errors import ConfigError
from ..renamed import renamed
from . import foreign

_BRACKETS = "[]{}()"  # lists, mappings, functions of overrides: what is wrong there is Hydra's to say
_MEANT_FOR_HYDRA = f"{_BRACKETS},'\"$=#"


def arguments(argv: list[str], conf: Path) -> tuple[list[str], Path | None]:
    """What Hydra is given for what the user typed, and the folder of a sweep where the user names it.

    `model=<path or hub id>` is no option of the group, so it becomes `model=custom model.name_or_path=...`,
    and a list of them a sweep.
    Raises ConfigError for what can be none of the two.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing; `ending` prints
    typed = get_args_parser().parse_intermixed_args(argv)
    if typed.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun runs what its pickle says: use -cp DIR/.hydra -cn config")
    flags = [a for a in argv if a not in typed.overrides]  # Hydra's parser wants them before the overrides
    if typed.config_path is not None and (folder := _folder(typed.config_path, conf)) != conf:
        foreign.load(folder, typed.config_name or "config", conf)
        flags += ["--config-path", str(conf), "--config-name", foreign.SAVED]
    if typed.config_dir is not None:
        foreign.vet(Path(typed.config_dir))
    given = [plain for argument in typed.overrides for plain in _in_hydras_words(argument, conf)]
    named = [_value(a) for a in given if a.startswith("hydra.sweep.dir=")]
    return flags + given, Path(named[-1]) if named and "${" not in named[-1] else None


def _in_hydras_words(argument: str, conf: Path) -> list[str]:
    argument = renamed(argument)
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
            f"model={value}: {', '.join(paths)} are checkpoints and {', '.join(others)} are options. "
            "One sweep cannot mix them: sweep over each kind by itself"
        )
    return ["model=custom", f"model.name_or_path={','.join(map(_quoted, paths))}"]


def _is_path(item: str, conf: Path) -> bool:
    return ("/" in item or Path(item).is_dir()) and not (conf / "model" / f"{item}.yaml").exists()


def _listed(key: str, value: str) -> list[str]:
    """The values of a sweep, or the only one. A comma in a path or in quotes separates nothing."""
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


def _folder(path: str, conf: Path) -> Path:
    """Relative to the working directory, or to run.py, where Hydra looks."""
    here = Path(path).resolve()
    return here if here.is_dir() else (conf.parent / path).resolve()
