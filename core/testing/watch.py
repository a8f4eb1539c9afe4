"""Finds the policy that writes what it may only read: every switch between core and policy code compares the
state before and after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .. import policy
from ..blocks import Block
from ..ledger import Mutated
from ..policy import Role
from ..request import Request

if TYPE_CHECKING:
    from ..engine import Engine

__all__ = ["Mutated", "Watch"]
COPIED_FIELDS = ("token_ids", "block_table", "token_times", "canonical_blocks")
#: logprobs are no policy's business.
PLAIN_FIELDS = tuple(name for name in Request.__slots__ if name not in (*COPIED_FIELDS, "logprobs"))
_FIELDS, _BLOCK = attrgetter(*PLAIN_FIELDS), attrgetter(*Block.__slots__)
VERBS = ("add", "add_decodes", "admits", "preempt", "pause", "reject", "wake_at", "limit")


class Watch:
    """Wraps the roles before the engine is built (`over`), then the step's verbs (`attach`)."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._running: list[Role | None] = []  # whose code runs, innermost last; None is the core's
        self._before: list[Any] = []
        self._watched_requests: list[Request] = []
        self._met: dict[int, Request] = {}  # requests that were handed to policies, ended ones too

    def over(self, roles: dict[str, Role]) -> None:
        for role in {id(r): r for name, r in roles.items() if name != "executor"}.values():
            for name in _methods(type(role)):
                setattr(role, name, self._watched(getattr(role, name), role))

    def attach(self, engine: Engine) -> None:
        self._engine = engine
        for owner, names in ((engine.builder, VERBS), (engine.roster.pins, ("pin", "unpin", "drop"))):
            for name in names:
                setattr(owner, name, self._watched(getattr(owner, name), None))

    def _watched(self, function: Callable[..., Any], role: Role | None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if isinstance(value, Request):
                    self._met[value.index] = value
            answer = self._switch(role, function, *args, **kwargs)
            return (
                self._lazily(answer, role)
                if inspect.isgenerator(answer) or hasattr(answer, "__next__")
                else answer
            )

        return call

    def _lazily(self, answer: Iterator[Any], role: Role | None) -> Iterator[Any]:
        done = object()
        while (item := self._switch(role, next, answer, done)) is not done:
            yield item

    def _switch(self, role: Role | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._verify()
        self._running.append(role)
        self._remember()
        try:
            answer = function(*args, **kwargs)
            self._verify()
            return answer
        finally:
            self._running.pop()
            self._remember()

    def _remember(self) -> None:
        if self._running and self._running[-1] is not None:
            engine = self._engine
            if engine is not None:
                self._watched_requests = list(
                    {
                        **self._met,
                        **{r.index: r for r in (*engine.running.items, *engine.waiting.items)},
                    }.values()
                )
            self._before = self._state()

    def _verify(self) -> None:
        role = self._running[-1] if self._running else None
        if role is None or self._engine is None:
            return
        after = self._state()
        if after != self._before:
            names = self._names()
            changed = [
                f"{n}: {a} became {b}" for n, a, b in zip(names, self._before, after, strict=False) if a != b
            ]
            raise Mutated(
                f"changed what policies may only read: {'; '.join(changed[:3])}. Use the verbs of "
                "StepBuilder, and keep your own state on self",
                plugin=role.plugin_name,
                step=self._engine.view.step,
            )

    def _state(self) -> list[Any]:
        """Everything a policy may only read, in the order of `_names`."""
        engine = self._engine
        if engine is None:
            return []
        builder = engine.builder
        state: list[Any] = [
            builder.tokens_left,
            builder.seqs_left,
            [r.index for r in builder.requests],
            [r.index for r in engine.running.items],
            [r.index for r in engine.waiting.items],
            engine.view.now,
            engine.pool.free_blocks.copy(),
        ]
        for request in self._watched_requests:
            state += _FIELDS(request)
            state += (
                request.token_ids.copy(),
                request.block_table.copy(),
                request.token_times.copy(),
                request.canonical_blocks.copy(),
            )
        for block in engine.pool.blocks:
            state += _BLOCK(block)
        return state

    def _names(self) -> list[str]:
        engine = self._engine
        assert engine is not None
        names = [
            "step.tokens_left",
            "step.seqs_left",
            "requests in the step",
            "running",
            "waiting",
            "view.now",
            "free blocks",
        ]
        names += [f"{r.id}.{f}" for r in self._watched_requests for f in (*PLAIN_FIELDS, *COPIED_FIELDS)]
        return names + [f"block {b.id}.{f}" for b in engine.pool.blocks for f in Block.__slots__]


def _methods(kind: type) -> list[str]:
    """What the core may call on a role: the public functions of its bases in core/policy.py, `setup`
    apart."""
    names = [
        n
        for c in kind.__mro__
        if c.__module__ == policy.__name__
        for n, f in vars(c).items()
        if inspect.isfunction(f)
    ]
    return [n for n in dict.fromkeys(names) if not n.startswith("_") and n != "setup"]
