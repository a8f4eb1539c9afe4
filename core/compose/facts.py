"""A composition as flat facts, which can be kept in a file and compared name by name."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict
from typing import TYPE_CHECKING, Any

from ..renamed import with_names_of_today
from .hooks import Registry

if TYPE_CHECKING:
    from .build import Composition

#: As JSON has them: "order" -> "vtc", "order.wq" -> 2.0, "engine.block_size" -> 16, "seed" -> 0.
Facts = dict[str, Any]


def facts(registry: Registry, composition: Composition) -> Facts:
    """Every choice with all of its parameters, defaults included, and every node that belongs to no role."""
    found: Facts = {}
    for role, (name, given) in composition.choices.items():
        found[role] = name
        for parameter in registry.get(role, name).parameters():
            made = parameter.default_factory
            default = parameter.default if made is MISSING else made()
            found[f"{role}.{parameter.name}"] = given.get(parameter.name, default)
    for node in ("engine", "model", "hardware", "parallel", "slo"):
        found |= {f"{node}.{name}": value for name, value in asdict(getattr(composition, node)).items()}
    found["seed"] = composition.seed
    text = json.dumps(found, default=str)
    for value, named in composition.concealed.items():
        text = text.replace(json.dumps(value)[1:-1], named)
    plain: Facts = json.loads(text)
    return plain


ABSENT = "absent"


def differences(recorded: Facts, given: Facts) -> list[str]:
    """One line for each fact that is not the same, in the order of the names; of another plugin, its name
    alone."""
    recorded, given = with_names_of_today(recorded), with_names_of_today(given)
    lines = []
    others: set[str] = set()
    for name in sorted(recorded.keys() | given.keys()):  # a role comes before its parameters
        then, now = (json.dumps(side[name]) if name in side else ABSENT for side in (recorded, given))
        if then != now and name.partition(".")[0] not in others:
            lines.append(f"{name}={now}, recorded with {then}")
            others |= {name} if "." not in name else set()
    return lines
