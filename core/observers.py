"""Telling the observers of an engine. One that raises is named, and the others are closed all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .calls import Calls
from .outputs import RunResult
from .outside import Observer
from .request import Request


def tell(observers: Sequence[Observer], calls: Calls, event: str, *args: Any) -> None:
    for observer in observers:
        calls.call(observer, getattr(observer, event), *args)


def tell_ended(observers: Sequence[Observer], calls: Calls, ended: Sequence[Request]) -> None:
    """Of requests that they have not heard of."""
    if ended:
        tell(observers, calls, "on_requests", ended)


def close(
    observers: Sequence[Observer],
    calls: Calls,
    ended: Sequence[Request],
    result: RunResult,
) -> BaseException | None:
    """Closes each of them, also when another one fails: results must not depend on neighbours. `ended`:
    requests that they have not heard of. Returns the first error."""
    problem: BaseException | None = None
    for observer in observers:
        try:
            if ended:
                calls.call(observer, observer.on_requests, ended)
            calls.call(observer, observer.close, result)
        except (Exception, SystemExit) as error:
            problem = problem or error
    return problem
