"""Intake: from an arrival to a request that waits, or to a refusal with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .arrivals import ArrivalQueue
from .blocks import BlockPool
from .errors import WorkloadError
from .executor import Executor
from .inputs import Arrival
from .ledger import Ledger
from .prompts import readable
from .request import Request
from .roster import Roster

R = TypeVar("R", bound=Request)


class Intake:
    """Makes the requests of an engine. Ids are unique in a run, indices in an engine."""

    def __init__(
        self,
        arrivals: ArrivalQueue,
        roster: Roster,
        pool: BlockPool,
        executor: Executor,
        *,
        max_model_len: int,
        ledger: Ledger | None,
    ) -> None:
        self._arrivals, self._roster, self._pool, self._ledger = arrivals, roster, pool, ledger
        self._executor, self._max_model_len = executor, max_model_len
        self.num_requests = 0  # so far, over all runs: the next index
        self.ids: set[str] = set()  # of this run
        self._announced: set[str] = set()  # ids that arrivals are known to bring
        self._aborted: set[str] = set()  # ids that are to end as soon as they are met

    def begin_run(self, arrivals: Iterable[Arrival], *, forget: bool) -> None:
        """Of a list, every id is known beforehand; `forget` those of the run before."""
        if forget:
            self.ids.clear()
        self._announced.clear()
        if isinstance(arrivals, list):
            self._announced.update(arrival.id for arrival in arrivals if isinstance(arrival.id, str))

    def ingest(self, now: float, welcome: Callable[[Request, float], None]) -> int:
        """Takes in what has arrived; returns how many. `welcome` is called for each that waits."""
        count = 0
        for arrival in self._arrivals.until(now):
            count += 1
            request, refusal, output_len = self._request(arrival)
            if refusal:
                self._roster.refuse(request, refusal, now)
            else:
                self.account(request)
                self._roster.arrive(request, now, output_len)
                welcome(request, now)
        return count

    def account(self, request: Request) -> None:
        """It is in the books from now on, where any are kept."""
        if self._ledger is not None:
            self._ledger.arrived(request)

    def attached(self, arrival: Arrival) -> Request:
        """The request of an arrival that comes from another engine. Raises WorkloadError for one that can
        never run here."""
        known = arrival.id in self.ids
        request, refusal, _ = self._request(arrival)
        if refusal:
            if not known:
                self.ids.discard(request.id)  # it may come again, when there is room for it
            raise WorkloadError(f"Engine.attach: request {request.id}: {refusal}")
        return request

    def abort(self, id: str) -> None:
        """The request with this id ends at the next `end_aborted`, or when it arrives. Thread-safe."""
        self._aborted.add(id)

    def end_aborted(self, now: float) -> int:
        """Ends who was aborted; returns how many. Ids that have ended already are forgotten."""
        count = 0
        for id in self.take_aborted() if self._aborted else ():
            if (request := self._roster.present.get(id)) is not None:
                self._roster.abort(request, now)
                count += 1
        return count

    def take_aborted(self) -> set[str]:
        """Ids of requests that have been met and are to end now."""
        met = self._aborted & self.ids
        self._aborted -= met
        return met

    def end_run(self) -> None:
        """Nobody whom an abort was meant for comes any more."""
        self._aborted.clear()

    def _request(self, arrival: Arrival) -> tuple[Request, str, int | None]:
        """The request, why it can never run ("" if it can), and the length of its emulated answer."""
        arrival, unreadable = readable(arrival)
        request = self.numbered(arrival, Request)
        refusal = unreadable or self.refusal(request, arrival.output_len, _ends(request.token_ids))
        self.ids.add(request.id)
        return request, refusal, arrival.output_len

    def numbered(self, arrival: Arrival, kind: type[R]) -> R:
        """The next request: with the next index, and an id."""
        eos = self._executor.caps.eos_token_ids
        request = kind(
            arrival,
            self.num_requests,
            max_model_len=self._max_model_len,
            eos_token_ids=eos,
            id=self._automatic_id() if arrival.id is None else None,
        )
        self.num_requests += 1
        return request

    def _automatic_id(self) -> str:
        """r and the request's index, or the next number that no other request has or is known to bring."""
        number = self.num_requests
        while (id := f"r{number}") in self.ids or id in self._announced:
            number += 1
        return id

    def refusal(self, request: Request, output_len: int | None, ends: tuple[int, int]) -> str:
        """Why a request can never run; "" if it can. `ends`: the lowest and the highest token of a prompt
        that fits the context."""
        prompt, vocab = request.num_prompt_tokens, self._executor.caps.vocab_size
        if request.id in self.ids:
            return f"id {request.id!r} is taken: ids must be unique in a run"
        if prompt == 0:
            return "empty prompt: expected at least one token"
        if prompt >= self._max_model_len:
            context = f"the context of {self._max_model_len}"
            return f"prompt of {prompt} tokens does not fit {context}: one token must be left for the answer"
        if output_len is not None and output_len < 1:
            return f"output length {output_len}: expected at least 1"
        if request.sampling.stop and not self._roster.decides_stop_strings:
            has_none = f"{self._executor.plugin_name} has none for this model"
            return f"stop strings need a tokenizer, and {has_none}: use stop_token_ids"
        low, high = ends
        if low < 0 or high >= vocab:
            return f"token id {low if low < 0 else high} is outside the vocabulary of {vocab}"
        if (wanted := request.sampling.logprobs) is not None and wanted > vocab:
            return f"logprobs={wanted}: the vocabulary has {vocab} tokens"
        longest = min(request.max_num_tokens, prompt + (output_len or request.max_num_tokens))
        need = self._pool.layout.num_blocks(longest - 1)  # the last token is sampled, never computed
        if need > self._pool.num_blocks:
            has = f"the pool has {self._pool.num_blocks}"
            return f"needs up to {need} KV blocks, {has}: lower max_tokens or raise engine.num_blocks"
        return ""


def _ends(tokens: Sequence[int]) -> tuple[int, int]:
    return (min(tokens), max(tokens)) if tokens else (0, 0)
