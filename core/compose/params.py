"""What a parameter may be: said once, where a dataclass declares it, and checked wherever its object is made.

    rate: float = param(1.0, above=0, max=1e9, unit="requests a second")

A field without `param` is checked too: numbers are finite, an int is no bool and no 2.5, and None only where
the annotation has it.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError, near

KEY = "headway"  # of a field's metadata


@dataclass(frozen=True)
class Limits:
    """What a parameter's numbers, or each number of a list or dict, may be; `choices` are for texts."""

    min: float | None = None
    max: float | None = None
    above: float | None = None  # more than
    below: float | None = None  # less than
    choices: tuple[str, ...] = ()
    unit: str = ""
    finite: bool = True
    doc: str = ""

    def hold(self, value: float) -> bool:
        return (
            not math.isnan(value)
            and (math.isfinite(value) or not self.finite)
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The range and the documentation, as help shows them."""
        return "; ".join(part for part in (self.range, self.doc) if part)

    @property
    def range(self) -> str:
        """In a few words, such as "0 to 1, seconds"; "" where nothing is declared."""
        whole = self.min is not None and self.max is not None
        bounds = f"{_plain(self.min)} to {_plain(self.max)}" if whole else self.bounds()
        said = [" | ".join(self.choices), bounds, "" if self.finite else "may be infinite", self.unit]
        return ", ".join(part for part in said if part)

    def bounds(self, words: tuple[str, str, str, str] = (">=", ">", "<=", "<")) -> str:
        """Such as ">= 0 and <= 1", with these words for min, above, max and below; "" without any."""
        given = zip(words, (self.min, self.above, self.max, self.below), strict=True)
        return " and ".join(f"{word} {_plain(bound)}" for word, bound in given if bound is not None)


NOTHING_SAID = Limits()
_COUNTS = ("at least", "more than", "at most", "less than")
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "a table",
}


def param(
    default: Any = MISSING,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    unit: str = "",
    finite: bool = True,
    doc: str = "",
) -> Any:
    """A dataclass field with a range. A list or dict as `default` is copied for every object; None needs `|
    None` in the annotation.

    min, max: the ends, which are allowed; above, below: ends which are not. For a list or dict they hold for
    each number in it. choices: the texts that are allowed. finite=False allows infinity; NaN is never right.
    unit, doc: for help.
    """
    limits = Limits(min, max, above, below, choices=tuple(choices), unit=unit, finite=finite, doc=doc)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata={KEY: limits})
    return field(default=default, metadata={KEY: limits})


def limits_of(parameter: Field[Any]) -> Limits:
    found = parameter.metadata.get(KEY, NOTHING_SAID)
    return found if isinstance(found, Limits) else NOTHING_SAID


def describe(parameter: Field[Any]) -> str:
    """The declared range of a field in a few words; "" where nothing is declared."""
    return limits_of(parameter).range


def check(owner: Any, node: str, error: type[Exception] = ConfigError) -> None:
    """Raises `error`, which names `node.field=value`, for the first field of a dataclass object that is not
    what its declaration says.

    Scalars of numpy become Python's, and whole numbers of a float field floats.
    """
    # Defaults were checked when the class was registered; a request's parameters are mostly defaults.
    values = {f.name: getattr(owner, f.name) for f in fields(owner) if f.init}
    given = {f.name: values[f.name] for f in fields(owner) if f.init and values[f.name] is not f.default}
    for name, value in checked(type(owner), given, node, error).items():
        if value is not given[name]:
            object.__setattr__(owner, name, value)  # a frozen dataclass as well


def checked(
    config: type,
    given: Mapping[str, Any],
    node: str,
    error: type[Exception] = ConfigError,
) -> dict[str, Any]:
    """Values by field as `check` would leave them, before an object is made of them. Names that are no field
    pass as they are."""
    known = _declared(config)
    values = dict(given)
    for name, value in values.items():
        if name in known:
            try:
                values[name] = _fit(value, *known[name], name)
            except _Wrong as wrong:
                path, found, expected = wrong.args
                where = f"{node}.{path}" if node else path
                raise error(f"{where}={_short(found)}: expected {expected}") from None
    return values


@cache
def _declared(config: type) -> dict[str, tuple[Any, Limits]]:
    """Field -> (its type, its limits). Types that cannot be resolved, as inside functions, are not
    checked."""
    try:
        hints = get_type_hints(config)
    except (NameError, AttributeError, TypeError, SyntaxError):
        hints = {}
    return {f.name: (hints.get(f.name, Any), limits_of(f)) for f in fields(config) if f.init}


class _Wrong(Exception):
    """(where within the parameters, the value there, what was expected)"""


def _fit(value: Any, hint: Any, limits: Limits, path: str) -> Any:
    if type(value) not in _NAMES and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a scalar of numpy
    arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    arm = next((arm for arm in arms if _is(value, arm)), _Wrong)
    if arm is _Wrong:
        raise _Wrong(path, value, _expected(hint, limits))
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)):
        return _number(value, arm, limits, path)
    if isinstance(value, str) and limits.choices and value not in limits.choices:
        meant = near(value, limits.choices)
        hint = f".{meant}" if "Did you mean" in meant else ""
        raise _Wrong(path, value, f"one of {', '.join(limits.choices)}{hint}")
    if isinstance(value, Mapping) and isinstance(arm, type) and is_dataclass(arm):
        return _made(value, arm, path)
    if isinstance(value, Mapping):
        inner = (get_args(arm) or (Any, Any))[1]
        return {key: _fit(each, inner, limits, f"{path}.{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        kinds = get_args(arm) or (Any,)
        kinds = kinds if len(kinds) == len(value) else kinds[:1] * len(value)  # tuple[int, str], or list[int]
        items = [_fit(value[i], kinds[i], limits, f"{path}[{i}]") for i in range(len(value))]
        return items if isinstance(value, list) else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        for name, declared in _declared(type(value)).items():
            object.__setattr__(value, name, _fit(getattr(value, name), *declared, f"{path}.{name}"))
    return value


def _made(entries: Mapping[str, Any], kind: type, path: str) -> Any:
    """The object of a nested dataclass that was given as a table."""
    known = _declared(kind)
    for name in entries:
        if name not in known:
            raise _Wrong(f"{path}.{name}", entries[name], f"one of the parameters {', '.join(known)}")
    return kind(**{name: _fit(value, *known[name], f"{path}.{name}") for name, value in entries.items()})


def _number(value: float, arm: Any, limits: Limits, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest float
        number = math.inf if value > 0 else -math.inf
    if not limits.hold(number if math.isinf(number) else value):
        count = limits.bounds(_COUNTS) or "a smaller number"
        raise _Wrong(path, value, count if arm is int else _expected(arm, limits))
    return number if arm is float else value


def _is(value: Any, hint: Any) -> bool:
    """Whether a value's type, not yet what is in it, is that of an annotation; true for those not checked."""
    kind = get_origin(hint) or hint
    if kind in (None, NoneType):
        return value is None
    if kind is Literal:
        return value in get_args(hint)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if kind in (list, tuple):
        return isinstance(value, (list, tuple))
    if kind is dict:
        return isinstance(value, Mapping)
    if kind is str:
        return isinstance(value, (str, os.PathLike))
    if isinstance(kind, type) and is_dataclass(kind):
        return isinstance(value, (kind, Mapping))
    return kind is not bool or isinstance(value, bool)


def _expected(hint: Any, limits: Limits) -> str:
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return ", or ".join(_expected(arm, limits) for arm in get_args(hint))
    if kind in (None, NoneType):
        return "none"
    if kind is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if kind is str and limits.choices:
        return f"one of {', '.join(limits.choices)}"
    if kind is int:
        return ", ".join(part for part in (_NAMES[int], limits.bounds(_COUNTS)) if part)
    if kind in (list, tuple):
        return f"a list, each {_expected((get_args(hint) or (Any,))[0], limits)}"
    if kind is dict:
        return f"a table of names, each {_expected((get_args(hint) or (Any, Any))[1], limits)}"
    if kind is float or kind is Any:
        return f"{'a finite number' if limits.finite else 'a number'} {limits.bounds()}".rstrip()
    if isinstance(kind, type) and is_dataclass(kind):
        return f"a table of {', '.join(_declared(kind))}"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _plain(number: float | None) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
