"""What a request asks for: an arrival and its parts, as a workload states them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .compose.params import check, param

GREEDY = 1e-5  # temperatures below it pick the most likely token, as in vLLM


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Names and meanings are vLLM's. `temperature=0` is greedy. `max_tokens=None` means up to the model's
    context."""

    temperature: float = param(1.0, min=0, max=1e6, doc="below 1e-5 is greedy")
    top_k: int = param(0, min=-1, doc="0 or -1: off")
    top_p: float = param(1.0, above=0, max=1)
    min_p: float = param(0.0, min=0, max=1)
    max_tokens: int | None = param(16, min=1)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = param((), min=0)
    ignore_eos: bool = False
    # no plan before its last token is on the host: a grammar makes a mask of it
    waits_for_token: bool = False
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
    """Who a request belongs to. Policies key their state on these; blocks remember the tags that last touched
    them."""

    client: str = ""
    session: str = ""  # conversation, program or agent id
    turn: int = 0
    category: str = ""  # e.g. chat, api, agent
    priority: int = 0  # smaller is more urgent, as in vLLM
    tool: str = ""  # the tool call that follows this request, "" for none
    parents: tuple[str, ...] = ()  # ids of the calls of its program whose answers it waited for, where known
    last: bool = False  # nothing of its program follows, where that is known
    # that its model is fitted with (LoRA), "" for none; its KV is of no use to others, so salt it
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as a workload states it. `output_len` is the true length: only the engine and roles
    that declare `sees_truth` see it."""

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
