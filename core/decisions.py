"""The decision log's hash: what was decided, never when. Same seed, same hash, on any executor that emits the
same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from struct import pack

from .plan import StepPlan
from .request import Request


def _words(values: Sequence[int]) -> bytes:
    return pack(f"{len(values)}q", *values)


class DecisionLog:
    """Chains every plan into one digest: who, from where, how many tokens, into which blocks, at whose
    expense."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new run: nothing is decided yet."""
        self._hash = blake2b(digest_size=16)
        self.num_steps = 0

    def record(self, plan: StepPlan, evicted: Sequence[int], rejected: Sequence[Request]) -> None:
        update = self._hash.update
        rest = [x for request, first, blocks in plan.allocated for x in (request.index, first, *blocks)]
        rest += [r.index for r in plan.preempted]
        rest += evicted
        rest += [r.index for r in rejected]
        rest += [r.index for r in plan.paused]
        counts = [
            plan.step,
            len(plan.requests),
            len(plan.allocated),
            len(plan.preempted),
            len(evicted),
            len(rejected),
        ]
        update(_words(counts + [len(plan.paused)] if plan.paused else counts))
        update(_words([r.index for r in plan.requests]))
        update(_words(plan.starts))
        update(_words(plan.lengths))
        if rest:
            update(_words(rest))
        if plan.drafts or plan.copies:
            update(_words([x for place, drafts in plan.drafts.items() for x in (place, *drafts)]))
            update(_words([x for copy in plan.copies for x in copy]))
        self.num_steps += 1

    @property
    def hexdigest(self) -> str:
        return self._hash.hexdigest()
