"""Numbers as trace files write them: whole counts and finite seconds, or an error that says what stands
there."""

from __future__ import annotations

import re
from typing import Any

from .lines import Malformed

MOST_TOKENS = 10**12  # of one request; more is no measurement
MOST_SECONDS = 1e12  # from any origin; milliseconds since 1970 that were taken for seconds are beyond it
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)


def count(line: int, name: str, value: Any) -> int:
    """A number of tokens from 0: 12, 12.0, "12" or "12.0". (Zero is the engine's to refuse, that request
    alone.)"""
    number = _number(value)
    if number is not None and number < 0:
        raise Malformed(line, f"{name} {value} is negative: expected a whole number of tokens, at least 0")
    if number is None or number != number // 1:
        raise Malformed(line, f"{name} {_shown(value)}: expected a whole number of tokens, at least 0")
    if number > MOST_TOKENS:
        raise Malformed(line, f"{name} {_shown(value)}: expected at most {MOST_TOKENS:,} tokens")
    return int(number)


def seconds(line: int, name: str, value: Any, per_second: int = 1) -> float:
    """A time in seconds; `per_second` is the unit's, 1000 for milliseconds."""
    number = _number(value)
    if number is None or not -MOST_SECONDS <= number / per_second <= MOST_SECONDS:
        expected = f"expected a finite number, at most {MOST_SECONDS:g} seconds from 0"
        raise Malformed(line, f"{name} {_shown(value)}: {expected}")
    return number / per_second


def _number(value: Any) -> int | float | None:
    """Of a JSON number or of text that is one; None for all else, such as `true`, "1_000", nan and
    infinity."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        text = value.strip().lstrip("+-")
        if text.isdecimal() and len(text) > 30:
            return None
        value = int(value) if text.isdecimal() else float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e30 else None  # nan is not less either


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
