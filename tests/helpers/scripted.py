"""Engines for tests of the core: the scheduler is a function of the test, the executor the KV oracle."""

from __future__ import annotations

from collections.abc import Callable

from core.compose.config import EngineConfig
from core.engine import Engine
from core.inputs import Arrival, SamplingParams, Tags
from core.policy import Scheduler
from core.testing.oracle import OracleExecutor

from .roles import default_roles


class Scripted(Scheduler):
    """Calls `script(step, view)` each step."""

    plugin_name = "scheduler=scripted"

    def __init__(self, script: Callable) -> None:
        self.script = script

    def plan(self, step, view):
        self.script(step, view)


def everybody(step, view) -> None:
    for request in (*view.running, *view.waiting):
        step.add(request)


def engine(
    script: Callable = everybody, *, roles=None, executor=None, seed: int = 0, observers=(), **limits
) -> Engine:
    """Blocks of 4 tokens, 16 of them, unless `limits` say otherwise."""
    limits = {
        "block_size": 4,
        "num_blocks": 16,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "check": True,
        **limits,
    }
    executor = executor or OracleExecutor(num_blocks=limits["num_blocks"])
    built = default_roles(**({"scheduler": Scripted(script), "executor": executor} | (roles or {})))
    return Engine(built, EngineConfig(**limits), seed=seed, observers=observers)


def ask(prompt: int | list[int] = 6, answer: int = 3, time: float = 0.0, **fields) -> Arrival:
    """A request for `answer` tokens; a number stands for that many different-looking prompt tokens."""
    tokens = [(i * 3 + 1) % 5 for i in range(prompt)] if isinstance(prompt, int) else prompt
    tags = fields.pop("tags", Tags())
    return Arrival(time, tokens, SamplingParams(max_tokens=answer), tags=tags, **fields)
