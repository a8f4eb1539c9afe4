"""StepPlan: what an executor runs, and its only source of block tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .request import Request


class Chunk(NamedTuple):
    request: Request
    start: int  # first position computed
    length: int  # tokens
    sample: bool  # the chunk reaches the last known token, so the next one is sampled
    drafts: Sequence[int] = ()  # its last tokens, where they are guesses of what follows the last known one


class Allocation(NamedTuple):
    """Blocks that joined a request's table in this step: table[first : first + len(blocks)]."""

    request: Request
    first: int
    blocks: list[int]


class KVCopy(NamedTuple):
    """The content of a KV block goes to another block, of the same tier or another. Tier 0 is the pool, tier
    i the executor's `tier_blocks[i - 1]`."""

    source_tier: int
    source: int
    target_tier: int
    target: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What an executor runs. Four parallel lists instead of 256 objects; `chunks` reads them as one."""

    step: int
    now: float
    requests: list[Request]
    starts: list[int]
    lengths: list[int]
    samples: list[bool]
    num_tokens: int
    allocated: list[Allocation]  # in order; the executor's only source of block tables
    admitted: list[Request]  # start or restart in this step: their tables begin anew
    left: list[Request]  # finished, preempted, paused or aborted since the last plan: their rows are free
    preempted: list[Request]  # for this plan: of those, and of those that were paused before
    paused: list[Request]  # for this plan, with their blocks
    # by place in the plan; the lengths count them
    drafts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    # one after the other, after the steps before and before anything of this one
    copies: Sequence[KVCopy] = ()

    @property
    def chunks(self) -> Iterator[Chunk]:
        drafts = (self.drafts.get(place, ()) for place in range(len(self.requests)))
        return map(Chunk, self.requests, self.starts, self.lengths, self.samples, drafts)
