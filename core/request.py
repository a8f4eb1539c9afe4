"""A request and what it asks for. The engine is the only writer of a Request; policies read it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Any

from .params import check, param

_SORT_KEY = attrgetter("sort_key")
GREEDY = 1e-5  # temperatures below it pick the most likely token, as in vLLM
NO_STOP = 1 << 60  # "no hidden output length": larger than any context


class RequestState(Enum):
    WAITING = "waiting"  # never started
    RUNNING = "running"  # owns blocks, may be planned
    PREEMPTED = "preempted"  # was running; waits again, its generated tokens are kept
    FINISHED = "finished"
    REJECTED = "rejected"  # refused before it ever ran
    ABORTED = "aborted"  # stopped by the user or by the end of the run


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Names and meanings are vLLM's. `temperature=0` is greedy. `max_tokens=None` means up to the model's context."""

    temperature: float = param(1.0, min=0, max=1e6, doc="below 1e-5 is greedy")
    top_k: int = param(0, min=-1, doc="0 or -1: off")
    top_p: float = param(1.0, above=0, max=1)
    min_p: float = param(0.0, min=0, max=1)
    max_tokens: int | None = param(16, min=1)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = param((), min=0)
    ignore_eos: bool = False
    seed: int | None = None  # None: the run's seed
    logprobs: int | None = param(
        None,
        min=0,
        max=2**31 - 1,
        doc="number of top alternatives reported beside the sampled token",
    )

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            given = getattr(self, name)
            if given is None or isinstance(given, (list, set, frozenset)):
                object.__setattr__(self, name, tuple(given or ()))
        check(self, "", ValueError)
        if "" in self.stop:
            raise ValueError("stop='': expected texts of at least one character, or none")
        if self.temperature < GREEDY:
            object.__setattr__(self, "temperature", 0.0)


@dataclass(frozen=True, slots=True)
class SLO:
    """Latency targets in seconds; None means no target. Used by deadline policies and by goodput."""

    ttft: float | None = param(None, above=0, max=1e9, unit="seconds")
    tpot: float | None = param(None, above=0, max=1e9, unit="seconds")
    e2el: float | None = param(None, above=0, max=1e9, unit="seconds")

    def __post_init__(self) -> None:
        check(self, "slo")


@dataclass(frozen=True, slots=True)
class Tags:
    """Who a request belongs to. Policies key their state on these; blocks remember the tags that last touched them."""

    client: str = ""
    session: str = ""  # conversation, program or agent id
    turn: int = 0
    category: str = ""  # e.g. chat, api, agent
    priority: int = 0  # smaller is more urgent, as in vLLM
    tool: str = ""  # the tool call that follows this request, "" for none


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as a workload states it. `output_len` is the true length: only the engine and oracle roles see it."""

    time: float  # seconds on the run's clock
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams = SamplingParams()
    output_len: int | None = None  # emulated end of sequence after so many tokens; None: the model decides
    id: str | None = None
    tags: Tags = Tags()
    slo: SLO = SLO()
    cache_salt: str = ""  # requests share cached prefixes only within one salt
    prompt: str | None = None  # the text, where there was one
    refusal: str = ""  # why its source made no tokens of it: it is counted, and rejected with this reason


class Request:
    """The engine's record of one request. Policies may read everything that has no leading underscore.

    Token counts (the reason there is no phase flag; DESIGN "One step"):
      num_prompt_tokens     tokens the user gave
      num_tokens            known tokens plus placeholders of tokens that are being sampled in steps in flight
      num_computed_tokens   tokens whose KV is written, by completed steps or by a prefix hit
      num_scheduled_tokens  tokens in steps in flight
    The next chunk starts at num_computed_tokens + num_scheduled_tokens; a request decodes when exactly one is left.
    """

    __slots__ = (
        "id", "index", "arrival_time", "sort_key", "sampling", "tags", "slo", "cache_salt", "prompt",
        "token_ids", "num_prompt_tokens", "num_tokens", "num_computed_tokens", "num_scheduled_tokens",
        "block_table", "state", "finish_reason", "num_cached_tokens", "num_preemptions", "num_recomputed_tokens",
        "first_scheduled_time", "finish_time", "token_times", "logprobs", "stop_text", "stop_reason",
        "_limit", "_stop_at", "_stop_tokens", "_planned", "_in_flight",
        "_published", "_parent", "_shadow", "_match", "_past", "_since",
    )  # fmt: skip

    def __init__(self, arrival: Arrival, index: int, *, max_model_len: int, eos_token_ids: frozenset[int]) -> None:
        self.id = arrival.id if arrival.id is not None else f"r{index}"
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
        self._limit = longest  # num_tokens never exceeds this
        hidden = arrival.output_len
        self._stop_at = self.num_prompt_tokens + hidden if hidden is not None else NO_STOP
        stops = frozenset(arrival.sampling.stop_token_ids)
        self._stop_tokens = stops if arrival.sampling.ignore_eos or hidden is not None else stops | eos_token_ids
        self._planned = -1  # last step that planned or preempted this request
        self._in_flight = 0  # steps in flight that contain it
        self._published = 0  # leading blocks offered to the prefix cache
        self._parent = -1  # canonical cached block that the next published block hangs under
        self._shadow: dict[int, int] = {}  # table index -> canonical twin of a published duplicate, kept referenced
        self._match: Any = None  # memo of the last prefix match
        self._past: tuple[tuple[int, int], ...] = ()  # spans of positions that were planned before its preemptions
        self._since = 0  # first position that is planned since it was last admitted; cached ones lie before

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

    @property
    def num_new_tokens(self) -> int:
        """Tokens that could be planned now: 1 for a decode, the rest of the prompt for a prefill."""
        return self.num_tokens - self.num_computed_tokens - self.num_scheduled_tokens

    @property
    def is_prefill(self) -> bool:
        """True until everything but the last known token is computed or in flight; also while recomputing."""
        return self.num_tokens - self.num_computed_tokens - self.num_scheduled_tokens > 1 or not self.token_times

    def __repr__(self) -> str:
        return (
            f"Request({self.id}, {self.state.value}, prompt={self.num_prompt_tokens}, tokens={self.num_tokens}, "
            f"computed={self.num_computed_tokens}, in_flight={self.num_scheduled_tokens}, blocks={len(self.block_table)})"
        )


class RequestList:
    """Requests in the stable order (arrival, index). Appending in order of arrival is O(1)."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Request] = []

    def add(self, request: Request) -> None:
        insort(self.items, request, key=_SORT_KEY)

    def remove(self, request: Request) -> None:
        i = bisect_left(self.items, request.sort_key, key=_SORT_KEY)
        if i == len(self.items) or self.items[i] is not request:
            raise KeyError(request.id)
        del self.items[i]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.items)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What comes out of a run for one request. Times are seconds on the run's clock."""

    id: str
    index: int
    state: str
    finish_reason: str
    arrival_time: float
    first_scheduled_time: float
    finish_time: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    num_recomputed_tokens: int
    output_token_ids: list[int]
    token_times: list[float]
    tags: Tags
    slo: SLO
    prompt: str | None = None
    text: str | None = None  # the answer before a stop string; without one, the tokens are the answer
    logprobs: list[Any] = field(default_factory=list)
    stop_reason: int | str | None = None  # the token (of the end of sequence, too) or the stop string that ended it
    prompt_token_ids: list[int] = field(default_factory=list)  # of a text, whose answer reads on from it

    @classmethod
    def of(cls, r: Request) -> RequestOutput:
        return cls(
            r.id, r.index, r.state.value, r.finish_reason, r.arrival_time, r.first_scheduled_time, r.finish_time,
            r.num_prompt_tokens, r.num_cached_tokens, r.num_preemptions, r.num_recomputed_tokens,
            r.output_token_ids, r.token_times, r.tags, r.slo, r.prompt, r.stop_text, r.logprobs, r.stop_reason,
            [] if r.prompt is None else r.prompt_token_ids,
        )  # fmt: skip


@dataclass
class RunResult:
    """A run's raw outcome; `core.metrics.summarize` turns it into numbers."""

    outputs: list[RequestOutput] = field(default_factory=list)
    duration: float = 0.0
    num_steps: int = 0
    policy_time: float = 0.0  # CPU seconds of planning and book-keeping
    busy_time: float = 0.0  # seconds in which a step ran
    kv_total: int = 0
    kv_peak: int = 0
    num_evictions: int = 0
    num_preemptions: int = 0
    planned_tokens: int = 0
    decision_hash: str = ""
    status: str = "finished"  # or "interrupted", "failed"
    error: str = ""
    oracles: list[str] = field(default_factory=list)
    warmup_seconds: float = 0.0  # that the executor took to compile and capture, before the first step of its first run
    late_preparations: int = 0  # kernels compiled and graphs captured since, in this run
    step_time_basis: str = ""  # what predicted the times of steps that policies ask for; empty without a cost model
    derived: dict[str, Any] = field(default_factory=dict)  # parameters that were left None -> what this run made of them
