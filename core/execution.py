"""What an executor says of itself and of a step, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_NONE: Mapping[int, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ExecutorCaps:
    """What the engine must know of an executor before the first plan."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    placeholders: bool = True  # may a plan hold a token that a step in flight is still sampling?
    max_inflight: int = 2  # most plans in flight
    model: Any = None  # core.compose.config.ModelShape
    # plans in flight that suit it, no fewer than its pipeline's stages: engine.max_inflight where none is
    # given
    default_inflight: int = 1
    # tokens of a step that suit it: a scheduler's token_budget where none is given
    default_token_budget: int = 512
    # most tokens that one step gives a request; above 1, a request is in one plan at a time
    tokens_per_step: int = 1
    # draft tokens of one request that a step verifies; each that is right is one token more
    max_drafts: int = 0
    # KV blocks of each tier behind the pool, which plans may copy to and from
    tier_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Where simulated step times come from."""

    name: str
    error: float | None = None  # stated relative error of a step's time, 0.1 for 10%; None: never measured


class Tokens(Sequence[list[int]]):
    """What a step sampled: a list of token ids per planned request, empty where nothing was.

    Nearly every list holds one token, so they are kept flat: a list for each of 256 requests would cost the
    host a twentieth of its time. `first` is the first token of each request, -1 for none; `more` holds those
    that follow it, by place in the plan.
    """

    __slots__ = ("first", "more")

    def __init__(self, first: Sequence[int], more: Mapping[int, Sequence[int]] = _NONE) -> None:
        self.first, self.more = first, more

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Tokens:
        """Those lists, flat. Raises TypeError for what is no list of tokens."""
        more = {place: new[1:] for place, new in enumerate(lists) if len(new) > 1}
        return cls([new[0] if len(new) else -1 for new in lists], more)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return list(self)[place]
        first = self.first[place]
        return [first, *self.more.get(place % len(self.first), ())] if first >= 0 else []

    def __iter__(self) -> Iterator[list[int]]:
        if self.more:
            return (self[place] for place in range(len(self.first)))
        return ([token] if token >= 0 else [] for token in self.first)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Tokens.of({list(self)})"


@dataclass(frozen=True, slots=True)
class StepResult:
    """What `collect` returns. Tokens come as a list per planned request, or as `Tokens`, which costs less."""

    # empty where the plan does not sample; at least one token, in order, where it does
    tokens: Sequence[Sequence[int]]
    start: float
    end: float
    logprobs: Sequence[Sequence[Any]] | None = None  # one per token
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What an executor compiles and captures so that steps run fast, as far as it knows: of its own
    process."""

    seconds: float = 0.0  # spent before the first step: the warm-up
    # kernels compiled and graphs captured since the warm-up, in time that is charged to requests
    late: int = 0
