"""Requests of a compiled run, as observers and results see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from headway import Arrival, Request, RequestState

#: As source/request.h numbers them.
STATES = (
    RequestState.WAITING,
    RequestState.RUNNING,
    RequestState.PREEMPTED,
    RequestState.FINISHED,
    RequestState.REJECTED,
    RequestState.ABORTED,
)
REASONS = ("", "stop", "length")


class Elsewhere(Sequence[int]):
    """Stands for a prompt in its arrival: as long as it, and nobody is to copy it token by token."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __getitem__(self, index: Any) -> Any:
        raise IndexError("the tokens are kept as an array, elsewhere")


class NativeRequest(Request):
    """Its prompt is an array of 64-bit words, which becomes a list only for who asks."""

    __slots__ = ("answer", "words")

    def __init__(self, arrival: Arrival, index: int, **about: Any) -> None:
        self.words: Any = ()
        self.answer: list[int] = []
        super().__init__(arrival, index, **about)

    @property
    def token_ids(self) -> list[int]:
        return [*self.words.tolist(), *self.answer]

    @token_ids.setter
    def token_ids(self, tokens: list[int]) -> None:
        """The base class sets what it has read of `Elsewhere`."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.answer)

    @property
    def output_token_ids(self) -> list[int]:
        return self.answer

    @property
    def prompt_token_ids(self) -> list[int]:
        return list(self.words.tolist())

    def prompt_words(self) -> Any:
        return self.words


def ended(request: Request, row: Sequence[Any], tokens: list[int], times: list[float], reason: str) -> None:
    """Writes what became of it. `row` is one of HeadwayEnded in source/headway.cpp."""
    _, state, _, cached, preemptions, recomputed, count, first, finish = row
    request.state, request.finish_reason = STATES[state], reason
    request.num_cached_tokens, request.num_preemptions, request.num_recomputed_tokens = (
        cached,
        preemptions,
        recomputed,
    )
    request.first_scheduled_time, request.finish_time = first, finish
    request.num_tokens = request.num_prompt_tokens + count
    request.token_times = times
    if isinstance(request, NativeRequest):
        request.answer = tokens
    if reason == "stop" and tokens[-1] in request.stop_tokens:
        request.stop_reason = tokens[-1]
