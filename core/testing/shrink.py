"""Makes a failing case small: greedy delta debugging over requests, lengths, limits and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..compose.defaults import default_names
from .case import Ask, Case

PLAIN_ASK: dict[str, Any] = {
    "output_len": None,
    "client": "",
    "category": "",
    "priority": 0,
    "tool": "",
    "salt": "",
    "slo": (None, None, None),
    "time": 0.0,
}
PLAIN_LIMITS: dict[str, Any] = {
    "max_inflight": 1,
    "placeholders": True,
    "eos": False,
    "token_seconds": 0.0,
    "stop_after": None,
}
PLAIN_FILL = {**default_names(), "cache": "none"} | dict.fromkeys(("retention", "admission", "chunk"), "none")


def shrink(case: Case, fails: Callable[[Case], bool], attempts: int = 400) -> Case:
    """The smallest case found that still fails, after at most so many trials. `fails(case)` holds for the one
    given."""
    left = attempts
    again = True
    while again:
        again = False
        for smaller in _smaller(case):
            if left == 0:
                return case
            left -= 1
            if fails(smaller):
                case, again = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Candidates, the boldest first."""
    asks = case.asks
    size = len(asks) // 2
    while size:
        for at in range(0, len(asks), size):
            if rest := asks[:at] + asks[at + size :]:
                yield replace(case, asks=rest)
        size //= 2
    for i, (role, name, _) in enumerate(case.fill):
        if (plain := PLAIN_FILL.get(role, name)) != name:
            yield replace(case, fill=case.fill[:i] + ((role, plain, ()),) + case.fill[i + 1 :])
        elif case.fill[i][2]:
            yield replace(case, fill=case.fill[:i] + ((role, name, ()),) + case.fill[i + 1 :])
    for name, value in PLAIN_LIMITS.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    for blocks in dict.fromkeys((case.num_blocks // 2, case.num_blocks * 3 // 4, case.num_blocks - 1)):
        if 0 < blocks < case.num_blocks:  # short of memory with fewer tokens
            yield replace(case, num_blocks=blocks)
    for i, ask in enumerate(asks):
        for smaller in _smaller_ask(ask):
            yield replace(case, asks=asks[:i] + (smaller,) + asks[i + 1 :])


def _smaller_ask(ask: Ask) -> Iterator[Ask]:
    if ask.turns:
        yield replace(ask, turns=())
        yield replace(ask, turns=ask.turns[:-1])
    for name, value in PLAIN_ASK.items():
        if getattr(ask, name) != value:
            yield replace(ask, **{name: value})
    n = len(ask.prompt)
    for keep in dict.fromkeys((n // 2, n - 1)):
        if 0 < keep < n:
            yield replace(ask, prompt=ask.prompt[:keep])
    for most in dict.fromkeys((1, ask.max_tokens // 2, ask.max_tokens - 1)):
        if 0 < most < ask.max_tokens:
            yield replace(ask, max_tokens=most)
