"""What `StepBuilder.add` answers: true only when tokens were granted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Granted:
    """`n` tokens are in the step; `cached` tokens of the prompt came from the prefix cache (admissions
    only)."""

    n: int
    cached: int = 0

    def __bool__(self) -> Literal[True]:
        return True


@dataclass(frozen=True, slots=True)
class Refused:
    def __bool__(self) -> Literal[False]:
        return False


@dataclass(frozen=True, slots=True)
class NoBudget(Refused):
    """Nobody else fits into this step: no tokens or sequences are left, or too many requests run already.
    Ends a walk over those that wait."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class NeedBlocks(Refused):
    """`k` blocks are missing, or come back with a step in flight. Ends a walk: who comes later must not take
    what this one waits for."""

    k: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class NotReady(Refused):
    """This request alone cannot go on now: its tokens are in flight, or admission defers or rejects it. A
    walk goes on to the next one."""

    reason: str = ""


Grant = Granted | NoBudget | NeedBlocks | NotReady
