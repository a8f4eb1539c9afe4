"""A test double for `bench_engine.py seam`: the same engine with its decode policy written out by hand.

No scheduler, no StepBuilder, no view, no decision log: a step of decodes is one loop over the running requests. Whatever else happens
(arrivals, prompts, a pool that runs short) is left to the engine as it is.
"""

from __future__ import annotations

from collections.abc import Callable

from headway import Allocation, Engine, StepPlan


def wire(engine: Engine) -> Callable[[], None]:
    """Puts the double in place of the engine's planning. Answers how to take it out again."""
    original = engine._plan
    pool, size = engine.pool, engine.config.block_size

    def plan(now: float) -> tuple[bool, float | None]:
        running = engine.running.items
        if engine.waiting.items or pool.num_available < len(running) or any(r.num_new_tokens > 1 for r in running):
            return original(now)
        step = engine.num_steps
        requests, starts, allocated = [], [], []
        for request in running:
            start = request.num_computed_tokens + request.num_scheduled_tokens
            if request.num_tokens >= request._limit:
                continue  # its last token is being sampled
            if start >= len(request.block_table) * size:
                blocks = pool.allocate(1)
                allocated.append(Allocation(request, len(request.block_table), blocks))
                request.block_table.extend(blocks)
            request._planned = step
            request.num_scheduled_tokens += 1
            request.num_tokens += 1
            request._in_flight += 1
            requests.append(request)
            starts.append(start)
        if not requests:
            return False, None
        count = len(requests)
        left, engine._left = engine._left, []
        made = StepPlan(step, now, requests, starts, [1] * count, [True] * count, count, allocated, [], left, [])
        engine.num_steps += 1
        engine.planned_tokens += count
        engine._inflight.append((made, engine.executor.launch(made), 0.0, 0))
        return True, None

    engine._plan = plan  # type: ignore[method-assign]

    def undo() -> None:
        del engine._plan

    return undo
