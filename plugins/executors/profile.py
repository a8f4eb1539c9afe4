"""Step times measured on one machine for one model, as a sum of few terms whose seconds per unit are never
negative.

For a step of R chunks (s_i, n_i), which compute n_i tokens after s_i cached ones, T = sum n_i tokens in all:

    step = floor + sum_k slope_k * max(0, pad(T) - knot_k)    products: flat while weights are read, then not
         + sequence * R
         + decode_context * sum of s_i + 1 over decodes           keys and values read
         + prompt_context * sum of s_i + n_i over prompts
         + pair * sum of n_i s_i + n_i (n_i + 1) / 2 over prompts  attention's products

with coefficients of their own for steps of decodes alone. pad(T) is the size of the CUDA graph that runs the
step. More tokens, sequences or context never make a step shorter. `experiments/calibrate.py` measures and
writes one; the error that stands in it is of steps that the fit has not seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from headway import ConfigError, ModelShape

FORMAT = 1
TERMS = ("sequence", "decode_context", "prompt_context", "pair")
KINDS = ("decode", "mixed")


@dataclass(frozen=True)
class Terms:
    """Seconds per unit of one kind of step."""

    floor: float
    knots: list[int]  # tokens from which a slope counts, the first 0
    slopes: list[float]  # seconds per token from there on, on top of those before
    sequence: float
    decode_context: float
    prompt_context: float
    pair: float
    # tokens of the graphs, smallest first; above the last nothing is padded
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        numbers = [self.floor, *self.slopes, *(getattr(self, name) for name in TERMS)]
        if len(self.slopes) != len(self.knots) or not all(0 <= number < float("inf") for number in numbers):
            raise ValueError("expected as many slopes as knots, and no number below 0")

    def seconds(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        units = features(starts, lengths)
        tokens = padded(int(units[0]), self.sizes)
        # One by one: since Python 3.12, `sum` of floats answers another last bit than before.
        products = rest = 0.0
        for slope, knot in zip(self.slopes, self.knots, strict=True):
            if tokens > knot:
                products += slope * (tokens - knot)
        for name, unit in zip(TERMS, units[1:], strict=True):
            rest += getattr(self, name) * unit
        return self.floor + products + rest


def features(starts: Sequence[int], lengths: Sequence[int]) -> tuple[float, ...]:
    """Tokens, then units of TERMS."""
    decodes = prompts = pairs = 0
    for start, length in zip(starts, lengths, strict=True):
        if length == 1:
            decodes += start + 1
        else:
            prompts += start + length
            pairs += length * start + length * (length + 1) // 2
    return float(sum(lengths)), float(len(lengths)), float(decodes), float(prompts), float(pairs)


def padded(tokens: int, sizes: Sequence[int]) -> int:
    """The smallest of the sizes that holds so many tokens; the tokens themselves where none does."""
    at = bisect_left(sizes, tokens)
    return sizes[at] if at < len(sizes) else tokens


@dataclass(frozen=True)
class Profile:
    """What was measured, where, and how far off it is."""

    hardware: str
    shape: dict[str, Any]  # ModelShape, as data
    tp: int
    pp: int
    decode: Terms
    mixed: Terms
    # kind of step -> relative error of held-out steps: mean, p50 and p90 of its size; steps
    error: dict[str, dict[str, float]]
    made: dict[str, str]  # device, driver, versions, date

    def step_time(self, starts: Sequence[int], lengths: Sequence[int]) -> float:
        """Seconds of a step with these chunks."""
        terms = self.decode if sum(lengths) == len(lengths) else self.mixed
        return terms.seconds(starts, lengths)

    @property
    def stated_error(self) -> float | None:
        """What nine of ten steps that the fit has not seen stay within, of the kind of steps that is further
        off."""
        return max((found["p90"] for found in self.error.values()), default=None)

    def __str__(self) -> str:
        off = ", ".join(
            f"{kind} steps {found['p50']:.1%} (P90 {found['p90']:.1%})" for kind, found in self.error.items()
        )
        return f"profile of {self.made.get('device', self.hardware)}, tp={self.tp} pp={self.pp}, off by {off}"

    def check(self, path: Path, shape: ModelShape, hardware: str, tp: int, pp: int) -> None:
        """Raises ConfigError where this is no profile of such a run."""
        for name, here, asked in (
            ("hardware", self.hardware, hardware),
            ("model shape", self.shape, asdict(shape)),
            ("parallel.tp", self.tp, tp),
            ("parallel.pp", self.pp, pp),
        ):
            if here != asked:
                raise ConfigError(
                    f"executor.profile={path}: it is of {name} {_short(here, asked)}, the run has "
                    f"{_short(asked, here)}: "
                    "measure one with experiments/calibrate.py, or set executor.profile=none for the roofline"
                )


def _short(value: Any, other: Any) -> str:
    """The value, or what differs between two tables."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return str(value)
    return ", ".join(f"{key}={value[key]}" for key in value if value[key] != other.get(key))


def read(path: Path) -> Profile:
    """Raises ConfigError for what is no profile."""
    try:
        found = yaml.safe_load(path.read_text())
        if found.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}: measure it again with this version")
        return restored(found)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ConfigError(f"executor.profile={path}: is no profile of step times ({reason})") from error


def restored(kept: dict[str, Any]) -> Profile:
    """A profile from plain data. Raises KeyError, TypeError and ValueError for what is none."""
    kinds = {kind: Terms(**kept[kind]) for kind in KINDS}
    return Profile(**kept | kinds)


def write(profile: Profile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"format": FORMAT, **asdict(profile)}, sort_keys=False))


def matching(folder: Path, shape: ModelShape, hardware: str, tp: int, pp: int) -> Profile | None:
    """The profile in the folder that is of such a run."""
    for path in sorted(folder.glob("*.yaml")):
        profile = read(path)
        if (profile.hardware, profile.shape, profile.tp, profile.pp) == (hardware, asdict(shape), tp, pp):
            return profile
    return None
