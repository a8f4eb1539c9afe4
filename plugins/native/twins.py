"""Which runs have a compiled twin: every role by its exact class and parameters. Anything else runs in
Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headway import Observer, Run, VirtualClock, Workload
from plugins.cache.eviction.lru import LeastRecent
from plugins.cache.hash import HashBlocks
from plugins.cache.none import NoCache
from plugins.executors.cost import Roofline
from plugins.executors.profile import Profile
from plugins.executors.sim import SimExecutor
from plugins.schedulers.admission.always import Always
from plugins.schedulers.chunked import ChunkedPrefill
from plugins.schedulers.order.fcfs import FirstCome
from plugins.schedulers.prefill_first import PrefillFirst
from plugins.schedulers.victim.newest import Newest
from plugins.workloads.pace import TimedWorkload
from plugins.workloads.trace import Azure, BurstGPT, Mooncake, Trace

from . import followed


def _every(role: Any) -> str:
    """All parameters have a twin."""
    return ""


def _starts_at_any_step(scheduler: PrefillFirst) -> str:
    return f".max_wait_tokens={scheduler.max_wait_tokens}" if scheduler.max_wait_tokens else ""


def _recomputes(victim: Newest) -> str:
    return "" if victim.mode == "recompute" else f".mode={victim.mode}"


def _of_its_own(executor: SimExecutor) -> str:
    """Step times of a roofline or a profile, on a clock that has not begun."""
    fresh = type(executor.clock) is VirtualClock and executor.clock.now() == 0.0
    known = type(executor.cost_model) in (Roofline, Profile) and type(executor.roofline) is Roofline
    return "" if known and fresh else " with another cost model or clock"


#: Role -> class -> which of its parameters has no twin, "" where all have. None: the role may be left out.
TWINS: dict[str, dict[type | None, Callable[[Any], str]]] = {
    "scheduler": {ChunkedPrefill: _every, PrefillFirst: _starts_at_any_step},
    "order": {FirstCome: _every},
    "victim": {Newest: _recomputes},
    "chunk": {None: _every},
    "admission": {None: _every, Always: _every},
    "predictor": {None: _every},
    "cache": {HashBlocks: _every, NoCache: _every},
    "eviction": {LeastRecent: _every},
    "retention": {None: _every},
    "executor": {SimExecutor: _of_its_own},
}


def missing(run: Run) -> str:
    """What of a run has no twin, in words; "" where it can run compiled."""
    engine = run.engine
    for name, twins in TWINS.items():
        role = run.roles.get(name)
        kind = None if role is None else type(role)
        if kind not in twins or (problem := twins[kind](role)):
            found = (
                "none is chosen" if role is None else f"{role.plugin_name}{problem if kind in twins else ''}"
            )
            return f"{name}: {found} has no compiled twin"
    if listening := [role.plugin_name for roles in engine.calls.callbacks.values() for role, _ in roles]:
        return (
            f"{', '.join(dict.fromkeys(listening))}: hears of every request or step, and has no compiled twin"
        )
    if _follows_up(workload := run.roles["workload"]):
        return f"{workload.plugin_name}: asks again after an answer (a closed loop)"
    if watching := [
        observer for observer in engine.observers if observer is not run.step_log and _watches(observer)
    ]:
        return f"{getattr(watching[0], 'plugin_name', '') or type(watching[0]).__name__}: watches every step"
    if engine.inbox.is_open:
        return "engine.inbox is open: others may post requests"
    if engine.config.check:
        return "engine.check=true: the pool is verified after every step"
    if engine.counts.num_runs:
        return "the engine has run before"
    edited = followed.changed()
    return edited and f"{edited} was edited, and the compiled engine follows what it was before"


#: Formats of traces that know of no turns.
TURNLESS = ("azure", "burstgpt", "mooncake", "vllm_bench")


def _follows_up(workload: Any) -> bool:
    """Whether it may ask again after an answer."""
    follows = getattr(type(workload), "on_result", None)
    if type(workload) in (Trace, Azure, Mooncake, BurstGPT) and workload.follow == "answers":
        return workload.arrival == "closed" or workload.format_found() not in TURNLESS
    if follows in (TimedWorkload.on_result, Trace.on_result):
        return bool(workload.arrival == "closed")
    return follows is not Workload.on_result


def _watches(observer: Any) -> bool:
    """Whether it is to see each step, and cannot be told of many at once (`on_steps`)."""
    kind = type(observer)
    return getattr(kind, "on_step", Observer.on_step) is not Observer.on_step and not hasattr(
        kind, "on_steps"
    )
