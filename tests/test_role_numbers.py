"""Numbers that the core leaves to a role: each has a default there, and a policy's own is used, or refused by
the policy's name."""

from __future__ import annotations

import pytest
from helpers.scripted import Scripted, ask, engine, everybody

from core.errors import PolicyError
from core.testing.oracle import OracleExecutor
from plugins.cache.none import NoCache
from plugins.schedulers.victim.newest import Newest


class Preempting(Scripted):
    """Preempts the only request once, when it decodes; `tail`: how many blocks that takes off its end, None:
    the default."""

    def __init__(self, tail: object = None) -> None:
        super().__init__(self.preempts_once)
        self.done = False
        if tail is not None:
            self.tail_blocks = lambda request: tail

    def preempts_once(self, step, view) -> None:
        first = next(iter(view.running), None)
        if first is not None and first.num_output_tokens == 1 and not self.done:
            self.done = True
            step.preempt(first, "drop_tail")
        else:
            everybody(step, view)


def recomputed(tail: object = None) -> int:
    """Of 32 tokens in blocks of 4, without a cache that could give them back."""
    result = engine(roles={"scheduler": Preempting(tail), "cache": NoCache()}).run([ask(32, 4)])
    return result.outputs[0].num_recomputed_tokens


def test_a_scheduler_says_how_much_of_its_tail_a_request_drops() -> None:
    assert recomputed() == recomputed(2) == 8  # a quarter of 8 blocks
    assert recomputed(3) == 12 and recomputed(5) == 20


@pytest.mark.parametrize("tail", [0, -1, 1.5, True, "all"])
def test_a_tail_that_is_no_number_of_blocks_is_refused(tail: object) -> None:
    with pytest.raises(
        PolicyError, match=f"tail_blocks\\(\\) answered {tail!r}: expected a whole number of at least 1"
    ) as caught:
        recomputed(tail)
    assert caught.value.plugin == "scheduler=scripted"


def widest(share: object = None) -> int:
    """Requests of the largest plan, of 4 in a pipeline of two plans."""
    scheduler, seen = Scripted(lambda step, view: (everybody(step, view), seen.append(step.num_seqs))), []
    if share is not None:
        scheduler.plan_share = lambda num_requests, num_plans: share
    executor = OracleExecutor(num_blocks=16, placeholders=False)
    engine(roles={"scheduler": scheduler}, executor=executor, max_inflight=2).run(
        [ask(4, 4, id=f"r{i}") for i in range(4)]
    )
    return max(seen)


def test_a_scheduler_says_how_many_requests_each_plan_of_a_pipeline_takes() -> None:
    assert widest() == widest(2) == 2 and widest(1) == 1
    assert widest(3) == 3 and widest(100) == 4  # never more than max_num_seqs


class Patient(Newest):
    """A livelock is one after so many preemptions."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most_preemptions = lambda max_num_seqs: most


def test_a_victim_says_when_preemptions_are_a_livelock() -> None:
    assert Newest().most_preemptions(4) == 16
    running = engine(roles={"victim": Patient(1)})
    running.roster.preemptions_since_token = 1
    assert not running.roster.thrashing
    running.roster.preemptions_since_token = 2
    assert running.roster.thrashing
    with pytest.raises(PolicyError, match="victim=Patient: most_preemptions\\(\\) answered 0"):
        engine(roles={"victim": Patient(0)})
