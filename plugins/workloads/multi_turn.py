"""Conversations: each turn waits for the answer before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from headway import Arrival, Request, RequestState, Tags, WorkloadError, hookimpl

from .content import only_its_length
from .pace import Paced, finite, length_range, random_tokens


@dataclass
class MultiTurn(Paced):
    """Conversations in a closed loop: a turn is the whole talk so far plus new tokens, a think time after the last answer.

    `arrival` says when conversations begin; with `closed`, `concurrency` of them go on at any time. A conversation also ends where its
    next prompt would not fit the context, or its last turn was refused.
    """

    num_sessions: int = 16
    turns: Any = 4  # turns a conversation: a number, or [low, high] with both ends
    system_len: int = 64  # tokens that begin every conversation
    input_len: Any = 64  # new tokens a turn: a number, or [low, high]
    output_len: Any = 64  # tokens an answer: a number, or [low, high]
    think_time: float = 1.0  # mean seconds between an answer and the next turn, exponential; 0 is at once

    def __post_init__(self) -> None:
        super().__post_init__()
        self._input, self._output = length_range("input_len", self.input_len), length_range("output_len", self.output_len)
        self._turns = length_range("turns", self.turns)
        if self.num_sessions < 1 or self.system_len < 0 or self.think_time < 0:
            raise WorkloadError(
                f"workload.num_sessions={self.num_sessions}, system_len={self.system_len}, think_time={self.think_time}: expected at least 1, 0 and 0"
            )

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        self._seed, self._vocab_size, self._max_model_len = seed, vocab_size, max_model_len
        system: Sequence[int] = only_its_length(self.system_len)
        if self.system_len < max_model_len:
            system = random_tokens(Random(f"{seed}/system"), self.system_len, vocab_size)
        for session in range(self.num_sessions):
            yield self._turn(f"s{session}", 0, 0.0, system)

    def _chance(self, session: str, turn: int) -> Random:
        """Each turn draws from its own stream, so that the order in which answers come back changes nothing."""
        return Random(f"{self._seed}/{session}/{turn}")

    def _turn(self, session: str, turn: int, now: float, before: Sequence[int]) -> Arrival:
        rng = self._chance(session, turn)
        output, think = rng.randint(*self._output), rng.expovariate(1.0) * self.think_time
        length = rng.randint(*self._input)
        prompt: Sequence[int] = only_its_length(len(before) + length)
        if len(prompt) < self._max_model_len:
            prompt = [*before, *random_tokens(rng, length, self._vocab_size)]
        tags = Tags(client=session, session=session, turn=turn, category="chat")
        time = finite(now + think, think_time=self.think_time) if turn else now
        return Arrival(time, prompt, self.sampling(), output, f"{session}.{turn}", tags)

    def on_result(self, request: Request, now: float) -> Iterable[Arrival]:
        session, turn = request.tags.session, request.tags.turn
        turns = Random(f"{self._seed}/{session}").randint(*self._turns)
        if turn + 1 < turns and request.state is RequestState.FINISHED:
            following = self._turn(session, turn + 1, now, request.token_ids)
            if len(following.prompt_token_ids) < self._max_model_len:
                return [following]
        return super().on_result(request, now)


@hookimpl
def headway_register(registry):
    registry.add("workload", "multi_turn", MultiTurn)
