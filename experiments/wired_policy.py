"""A test double for `bench_engine.py seam`: the same engine with its decode policy written out by hand.

No scheduler, no StepBuilder, no view, no decision log: a step of decodes is one loop over the running
requests. Whatever else happens (arrivals, prompts, a pool that runs short) is left to the engine as it is.
"""

from __future__ import annotations

from collections.abc import Callable

from headway import Allocation, Engine, Request, StepPlan


def wire(engine: Engine) -> Callable[[], None]:
    """Puts the double in place of the engine's planning. Answers how to take it out again."""
    original = engine._plan
    pool, roster = engine.pool, engine.roster

    def plan(now: float) -> bool:
        running = engine.running.items
        if (
            engine.waiting.items
            or pool.num_available < len(running)
            or any(r.num_new_tokens > 1 for r in running)
        ):
            return original(now)
        step = engine.counts.num_steps
        requests: list[Request] = []
        starts: list[int] = []
        allocated = []
        rest = iter(running)
        while request := roster.schedule_decodes(rest, step, len(running), requests, starts):
            if request.num_tokens >= request.max_num_tokens:
                continue  # its last token is being sampled
            start, blocks = request.num_computed_tokens + request.num_scheduled_tokens, pool.allocate(1)
            allocated.append(Allocation(request, len(request.block_table), blocks))
            roster.schedule(request, step, start, 1, blocks)
            requests.append(request)
            starts.append(start)
        if not requests:
            return False
        count = len(requests)
        made = StepPlan(
            step=step,
            now=now,
            requests=requests,
            starts=starts,
            lengths=[1] * count,
            samples=[True] * count,
            num_tokens=count,
            allocated=allocated,
            admitted=[],
            left=roster.take_left(),
            preempted=[],
        )
        engine.counts.num_steps += 1
        engine.counts.planned_tokens += count
        engine.flights.launch(made, 0.0, 0)
        return True

    engine._plan = plan  # type: ignore[method-assign]

    def undo() -> None:
        del engine._plan

    return undo
