"""A request. `Roster` is the only writer of a Request; policies read it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from enum import Enum
from operator import attrgetter
from struct import pack
from typing import Any

from .inputs import Arrival

_SORT_KEY = attrgetter("sort_key")


class RequestState(Enum):
    WAITING = "waiting"  # never started
    RUNNING = "running"  # owns blocks, may be planned
    PREEMPTED = "preempted"  # was running; waits again, its generated tokens are kept
    PAUSED = "paused"  # was running; waits again, with its blocks
    FINISHED = "finished"
    REJECTED = "rejected"  # refused before it ever ran
    ABORTED = "aborted"  # stopped by the user or by the end of the run
    DETACHED = "detached"  # goes on in another engine


#: States in which a request waits for its next step.
WANT_TO_START = (RequestState.WAITING, RequestState.PREEMPTED, RequestState.PAUSED)


class Request:
    """The core's record of one request, written by `Roster` alone. Policies may read all of it.

    Token counts (the reason why there is no phase flag):
      num_prompt_tokens     tokens the user gave
      num_tokens            known tokens plus placeholders of tokens that are being sampled in steps in flight
      num_computed_tokens   tokens whose KV is written, by completed steps or by a prefix hit
      num_scheduled_tokens  tokens in steps in flight
    The next chunk starts at num_computed_tokens + num_scheduled_tokens; a request decodes when one is left.
    """

    __slots__ = (
        "id", "index", "arrival_time", "sort_key", "sampling", "tags", "slo", "cache_salt", "prompt",
        "token_ids", "num_prompt_tokens", "num_tokens", "num_computed_tokens", "num_scheduled_tokens",
        "block_table", "state", "finish_reason", "num_cached_tokens", "num_admissions", "num_preemptions",
        "num_recomputed_tokens", "first_scheduled_time", "finish_time", "token_times", "logprobs",
        "stop_text", "stop_reason", "max_num_tokens", "stop_tokens", "waits_for_token", "planned_step",
        "num_steps_in_flight", "num_published_blocks", "published_parent", "canonical_blocks",
        "planned_before", "planned_from",
    )  # fmt: skip

    def __init__(
        self,
        arrival: Arrival,
        index: int,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        id: str | None = None,
    ) -> None:
        """`id` is for an arrival that brings none."""
        self.id = arrival.id if arrival.id is not None else id or f"r{index}"
        self.index = index  # order of arrival, unique in a run
        self.arrival_time = arrival.time
        self.sort_key = (arrival.time, index)
        self.sampling, self.tags, self.slo = arrival.sampling, arrival.tags, arrival.slo
        self.cache_salt, self.prompt = arrival.cache_salt, arrival.prompt
        prompt = arrival.prompt_token_ids
        self.num_prompt_tokens = self.num_tokens = len(prompt)
        # Prompt, then generated tokens that have come back. A prompt that does not fit is rejected unread, by
        # its length.
        self.token_ids: list[int] = list(prompt) if len(prompt) < max_model_len else []
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.block_table: list[int] = []  # block ids, append-only while the request runs
        self.state = RequestState.WAITING
        self.finish_reason = ""
        self.num_cached_tokens = 0  # prefix hit at first admission; later admissions never count as hits
        self.num_admissions = 0  # 1 where it runs, or ran, for the first time
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.first_scheduled_time = -1.0
        self.finish_time = -1.0
        self.token_times: list[float] = []  # when each generated token came back, seconds
        self.logprobs: list[Any] = []
        self.stop_text: str | None = None  # the answer before a stop string
        self.stop_reason: int | str | None = None  # the token or the stop string that ended it
        declared = arrival.sampling.max_tokens
        longest = max_model_len if declared is None else min(max_model_len, self.num_prompt_tokens + declared)
        self.max_num_tokens = longest  # num_tokens never exceeds this
        stops = frozenset(arrival.sampling.stop_token_ids)
        only_own_stops = arrival.sampling.ignore_eos or arrival.output_len is not None
        self.stop_tokens = stops if only_own_stops else stops | eos_token_ids
        self.waits_for_token = arrival.sampling.waits_for_token  # not planned while its last one is sampled
        self.planned_step = -1  # last step that planned or preempted this request
        self.num_steps_in_flight = 0  # that contain it
        self.num_published_blocks = 0  # leading blocks offered to the prefix cache
        self.published_parent = -1  # canonical cached block that the next published block hangs under
        self.canonical_blocks: dict[int, int] = {}  # table index -> twin of a published duplicate, referenced
        self.planned_before: tuple[tuple[int, int], ...] = ()  # spans of positions planned before preemptions
        self.planned_from = 0  # first position planned since its last admission; cached ones lie before

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens that have come back."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    def prompt_words(self) -> bytes:
        """Its prompt's tokens, 64 bits each; none of a prompt that was rejected unread."""
        prompt = self.prompt_token_ids
        return pack(f"{len(prompt)}q", *prompt)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that could be planned now: 1 for a decode, the rest of the prompt for a prefill."""
        return self.num_tokens - self.num_computed_tokens - self.num_scheduled_tokens

    @property
    def canonical_table(self) -> list[int]:
        """Its block table as the prefix cache knows it: the twin in place of each published duplicate."""
        return [self.canonical_blocks.get(i, block) for i, block in enumerate(self.block_table)]

    @property
    def is_prefill(self) -> bool:
        """True until everything but the last known token is computed or in flight; also while recomputing."""
        return self.num_new_tokens > 1 or not self.token_times

    def __repr__(self) -> str:
        return (
            f"Request({self.id}, {self.state.value}, prompt={self.num_prompt_tokens}, "
            f"tokens={self.num_tokens}, "
            f"computed={self.num_computed_tokens}, in_flight={self.num_scheduled_tokens}, "
            f"blocks={len(self.block_table)})"
        )


class RequestList:
    """Requests in the stable order (arrival, index). Appending in order of arrival is O(1)."""

    __slots__ = ("_frozen", "items")

    def __init__(self) -> None:
        self.items: list[Request] = []  # read, never write
        self._frozen: tuple[Request, ...] | None = ()

    def frozen(self) -> tuple[Request, ...]:
        """As it is now; copied only when it has changed."""
        if self._frozen is None:
            self._frozen = tuple(self.items)
        return self._frozen

    def add(self, request: Request) -> None:
        self._frozen = None
        insort(self.items, request, key=_SORT_KEY)

    def remove(self, request: Request) -> None:
        i = bisect_left(self.items, request.sort_key, key=_SORT_KEY)
        if i == len(self.items) or self.items[i] is not request:
            raise KeyError(request.id)
        self._frozen = None
        del self.items[i]

    def clear(self) -> None:
        self._frozen = ()
        self.items.clear()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.items)
