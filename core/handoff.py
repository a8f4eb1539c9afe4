"""A request on its way from one engine to another, with its tokens and its KV.

Both engines are of one model, with blocks of the same size. Each is between two turns of its loop; the one
that takes the request may be another process's, if what the executors exchange can travel there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .inputs import Arrival

if TYPE_CHECKING:
    from .executor import Executor
    from .intake import Intake
    from .request import Request
    from .roster import Roster


@dataclass(frozen=True, slots=True)
class Handoff:
    """What the next engine must know. Times are seconds on the clock of the first."""

    arrival: Arrival  # as it was, with its id
    token_ids: list[int]  # the prompt and the answer so far
    block_size: int
    num_blocks: int  # full KV blocks that go with it, from its beginning on
    kv: Any = field(repr=False)  # what they hold, as `Executor.read_blocks` says it; None without any
    token_times: list[float]
    logprobs: list[Any]
    first_scheduled_time: float  # -1 for a request that never ran
    num_cached_tokens: int
    num_preemptions: int
    num_recomputed_tokens: int


def detach(
    intake: Intake,
    roster: Roster,
    executor: Executor,
    id: str,
    *,
    now: float,
    collect: Callable[[], None],
) -> Handoff | None:
    """Takes a request out of its engine. `collect` brings its steps in flight back first, which may end it;
    None for a request that is not there (any more)."""
    while (request := roster.present.get(id)) is not None and request.num_steps_in_flight:
        collect()
    if request is None:
        return None
    layout = roster.layout
    blocks = request.block_table[: layout.num_full_blocks(request.num_computed_tokens)]
    handoff = Handoff(
        arrival=_arrival(request, roster.hidden_ends.get(request.index)),
        token_ids=list(request.token_ids),
        block_size=layout.block_size,
        num_blocks=len(blocks),
        kv=executor.read_blocks(blocks) if blocks else None,
        token_times=list(request.token_times),
        logprobs=list(request.logprobs),
        first_scheduled_time=request.first_scheduled_time,
        num_cached_tokens=request.num_cached_tokens,
        num_preemptions=request.num_preemptions,
        num_recomputed_tokens=request.num_recomputed_tokens,
    )
    roster.detach(request, now)
    intake.ids.discard(id)  # it may come back
    return handoff


def _arrival(request: Request, hidden_end: int | None) -> Arrival:
    return Arrival(
        time=request.arrival_time,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        output_len=None if hidden_end is None else hidden_end - request.num_prompt_tokens,
        id=request.id,
        tags=request.tags,
        slo=request.slo,
        cache_salt=request.cache_salt,
        prompt=request.prompt,
    )


def attach(intake: Intake, roster: Roster, executor: Executor, handoff: Handoff, now: float) -> None:
    """Puts it among those that wait. Its blocks are the cached ones that hold the same, and new ones as far
    as there are any: what does not fit is computed again. Those that arrived can be matched from now on."""
    if handoff.block_size != roster.layout.block_size:
        sizes = f"KV blocks of {handoff.block_size} tokens cannot become blocks of {roster.layout.block_size}"
        raise ConfigError(f"Engine.attach: {sizes}: give both engines one engine.block_size")
    request = intake.attached(handoff.arrival)
    first, blocks = roster.attach(request, handoff, now)
    if blocks:
        executor.write_blocks(blocks, handoff.kv, first)
    intake.account(request)
