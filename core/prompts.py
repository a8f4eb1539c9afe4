"""What a request must be made of. What comes from outside is read here once, so that the engine meets plain
types alone."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from .inputs import SLO, Arrival, SamplingParams, Tags


def readable(arrival: Arrival) -> tuple[Arrival, str]:
    """The arrival with its prompt in plain ints, and what is wrong with its types: "" or a reason to refuse
    it.

    What cannot be read is left out of the arrival, so that a refused request can be told of like any other.
    """
    for name, (kind, expected) in _KINDS.items():
        value = getattr(arrival, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            id = arrival.id if isinstance(arrival.id, str) else None
            return Arrival(arrival.time, [], id=id), f"{name}={_short(value)}: expected {expected}"
    prompt = arrival.prompt_token_ids
    if arrival.refusal or (type(prompt) is list and set(map(type, prompt)) <= _INT):
        return arrival, arrival.refusal
    try:
        return replace(arrival, prompt_token_ids=token_ids(prompt)), ""
    except ValueError as error:
        return replace(arrival, prompt_token_ids=[]), str(error)


def token_ids(prompt: Any) -> Sequence[int]:
    """A list, tuple, range or array of integers as Python ints. Raises ValueError that says what it holds
    instead."""
    if hasattr(prompt, "tolist") and not isinstance(prompt, memoryview):  # NumPy, torch
        prompt = prompt.tolist()
        if type(prompt) is list and set(map(type, prompt)) <= _INT:
            return prompt
    # A range holds ints alone, and may stand for a prompt that is longer than any context: it is not read.
    if isinstance(prompt, range) and _is_countable(prompt):
        return prompt
    if isinstance(prompt, (range, *_NO_LISTS)) or not isinstance(prompt, Collection):
        raise ValueError(f"prompt is {_short(prompt)}: expected a list of token ids")
    known = []
    for token in prompt:
        if hasattr(token, "tolist"):
            token = token.tolist()
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise ValueError(f"prompt holds {_short(token)}: expected a list of token ids")
        known.append(int(token))
    return known


def _is_countable(prompt: range) -> bool:
    try:
        return len(prompt) >= 0
    except OverflowError:
        return False


_INT = {int}
_NO_LISTS = (str, bytes, bytearray, memoryview, dict, set, frozenset)
_KINDS: dict[str, tuple[Any, str]] = {
    "id": (str | None, "a text or None"),
    "sampling": (SamplingParams, "SamplingParams"),
    "output_len": (Integral | None, "an integer or None"),
    "tags": (Tags, "Tags"),
    "slo": (SLO, "an SLO"),
    "cache_salt": (str, "a text"),
    "prompt": (str | None, "a text or None"),
    "refusal": (str, "a text"),
}


def _short(value: Any) -> str:
    """A few words of it, however long it is."""
    return reprlib.repr(bytes(value[:40]) if isinstance(value, (bytes, bytearray, memoryview)) else value)
