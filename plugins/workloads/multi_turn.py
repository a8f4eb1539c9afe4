"""Conversations: each turn waits for the answer before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from headway import Arrival, Registry, Request, RequestState, Tags, hookimpl, param

from .content import only_its_length
from .pace import LONGEST, TimedWorkload, length_range, random_tokens


@dataclass
class MultiTurn(TimedWorkload):
    """Conversations in a closed loop: a turn is the whole talk so far plus new tokens, a think time after the
    last answer.

    `arrival` says when conversations begin; with `closed`, `concurrency` of them go on at any time. A
    conversation also ends where its next prompt would not fit the context, or its last turn was refused.
    """

    num_sessions: int = param(16, min=1, max=10_000_000)
    turns: int | list[int] = param(4, min=1, max=1_000_000, doc="of a conversation")
    system_len: int = param(64, min=0, max=LONGEST, unit="tokens", doc="that begin every conversation")
    input_len: int | list[int] = param(64, min=1, max=LONGEST, unit="tokens", doc="new ones in each turn")
    output_len: int | list[int] = param(64, min=1, max=LONGEST, unit="tokens", doc="of an answer")
    think_time: float = param(
        1.0,
        min=0,
        max=1e9,
        unit="seconds",
        doc="mean time between an answer and the next turn, exponential; 0 is at once",
    )

    def __post_init__(self) -> None:
        self._input, self._output = (
            length_range("input_len", self.input_len),
            length_range("output_len", self.output_len),
        )
        self._turns = length_range("turns", self.turns)

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> Iterator[Arrival]:
        self._seed, self._vocab_size, self._max_model_len = seed, vocab_size, max_model_len
        system: Sequence[int] = only_its_length(self.system_len)
        if self.system_len < max_model_len:
            system = random_tokens(Random(f"{seed}/system"), self.system_len, vocab_size)
        for session in range(self.num_sessions):
            yield self._turn(f"s{session}", 0, 0.0, system)

    def _chance(self, session: str, turn: int) -> Random:
        """Each turn draws from its own stream, so that the order in which answers come back changes
        nothing."""
        return Random(f"{self._seed}/{session}/{turn}")

    def _turn(self, session: str, turn: int, now: float, before: Sequence[int]) -> Arrival:
        rng = self._chance(session, turn)
        output, think = rng.randint(*self._output), rng.expovariate(1.0) * self.think_time
        length = rng.randint(*self._input)
        prompt: Sequence[int] = only_its_length(len(before) + length)
        if len(prompt) < self._max_model_len:
            prompt = [*before, *random_tokens(rng, length, self._vocab_size)]
        tags = Tags(client=session, session=session, turn=turn, category="chat")
        return Arrival(
            now + think if turn else now, prompt, self.sampling(), output, id=f"{session}.{turn}", tags=tags
        )

    def on_result(self, request: Request, now: float) -> Iterable[Arrival]:
        session, turn = request.tags.session, request.tags.turn
        turns = Random(f"{self._seed}/{session}").randint(*self._turns)
        if turn + 1 < turns and request.state is RequestState.FINISHED:
            following = self._turn(session, turn + 1, now, request.token_ids)
            if len(following.prompt_token_ids) < self._max_model_len:
                return [self.dealt(following)]
        return super().on_result(request, now)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("workload", "multi_turn", MultiTurn)
