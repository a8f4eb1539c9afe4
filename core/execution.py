"""What an executor says of itself and of a step, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ExecutorCaps:
    """What the engine must know of an executor before the first plan."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    placeholders: bool = True  # may a plan hold a token that a step in flight is still sampling?
    max_inflight: int = 2  # most plans in flight
    model: Any = None  # core.compose.config.ModelShape
    default_inflight: int = 1  # plans in flight that suit it, no fewer than its pipeline's stages: engine.max_inflight where none is given
    default_token_budget: int = 512  # tokens of a step that suit it: a scheduler's token_budget where none is given


@dataclass(frozen=True, slots=True)
class StepResult:
    """What `collect` returns. tokens: one entry a planned request, -1 where the plan does not sample."""

    tokens: Sequence[int]
    start: float
    end: float
    logprobs: Sequence[Any] | None = None
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What an executor compiles and captures so that steps run fast, as far as it knows: of its own process."""

    seconds: float = 0.0  # spent before the first step: the warm-up
    late: int = 0  # kernels compiled and graphs captured since the warm-up, in time that is charged to requests
