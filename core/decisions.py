"""The decision log's hash: what was decided, never when. Same seed, same hash, on any executor that emits the same tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from .plan import StepPlan
from .request import Request


class DecisionLog:
    """Chains every plan into one digest: who, from where, how many tokens, into which blocks, at whose expense."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)
        self.num_steps = 0

    def record(self, plan: StepPlan, evicted: Sequence[int], rejected: Sequence[Request]) -> None:
        update = self._hash.update
        header = (plan.step, len(plan.requests), len(plan.allocated), len(plan.preempted), len(evicted), len(rejected))
        update(array("q", header).tobytes())
        update(array("q", [r.index for r in plan.requests]).tobytes())
        update(array("q", plan.starts).tobytes())
        update(array("q", plan.lengths).tobytes())
        for request, first, blocks in plan.allocated:
            update(array("q", (request.index, first, *blocks)).tobytes())
        update(array("q", [r.index for r in plan.preempted]).tobytes())
        update(array("q", evicted).tobytes())
        update(array("q", [r.index for r in rejected]).tobytes())
        self.num_steps += 1

    @property
    def hexdigest(self) -> str:
        return self._hash.hexdigest()
