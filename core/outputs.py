"""What comes out: of one request, and of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .execution import TimeModel
from .inputs import SLO, Tags

if TYPE_CHECKING:
    from .request import Request


class TextStop(NamedTuple):
    """A stop string has ended an answer."""

    text: str  # of the answer, before the stop string
    reason: int | str | None  # the stop string


#: Whether the newest token of a request completes one of its stop strings.
StopText: TypeAlias = "Callable[[Request], TextStop | None]"


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
    # the token (of the end of sequence, too) or the stop string that ended it
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)  # of a text, whose answer reads on from it

    @classmethod
    def of(cls, r: Request) -> RequestOutput:
        return cls(
            r.id,
            r.index,
            r.state.value,
            r.finish_reason,
            r.arrival_time,
            r.first_scheduled_time,
            r.finish_time,
            r.num_prompt_tokens,
            r.num_cached_tokens,
            r.num_preemptions,
            r.num_recomputed_tokens,
            r.output_token_ids,
            r.token_times,
            r.tags,
            r.slo,
            r.prompt,
            r.stop_text,
            r.logprobs,
            r.stop_reason,
            [] if r.prompt is None else r.prompt_token_ids,
        )


@dataclass
class RunResult:
    """A run's raw outcome; `core.measure.metrics.summarize` turns it into numbers."""

    outputs: list[RequestOutput] = field(default_factory=list)
    duration: float = 0.0
    num_steps: int = 0
    policy_time: float = 0.0  # CPU seconds of planning and book-keeping
    busy_time: float = 0.0  # seconds in which a step ran
    kv_total: int = 0
    kv_peak: int = 0
    num_evictions: int = 0
    num_preemptions: int = 0
    num_pauses: int = 0
    planned_tokens: int = 0
    decision_hash: str = ""
    status: str = "finished"  # or "interrupted", "failed"
    error: str = ""
    saw_truth: list[str] = field(default_factory=list)
    # of compiling and capturing, before the first step of the executor's first run
    warmup_seconds: float = 0.0
    late_preparations: int = 0  # kernels compiled and graphs captured since, in this run
    step_time_basis: str = ""  # what predicted the step times that policies ask for; "" without a cost model
    # where simulated step times come from; None where they were measured
    time_model: TimeModel | None = None
    # parameters that were left None -> what became of them
    derived: dict[str, Any] = field(default_factory=dict)
    loop: str = ""  # what went through the run: "python", or the name of what stood in for the engine
