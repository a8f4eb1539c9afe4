"""Garbage collection while an engine runs: rarer than Python's default, and as it was afterwards.

Reference counts free nearly all that a step makes, so the collector walks over requests, blocks and logs that
are all alive. It stays on, since a policy may make reference cycles: those that wait for it are bounded.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

# more objects made than freed since the last collection bring the next one; Python's default is 700
YOUNG = 10_000

_lock = Lock()
_runs: set[object] = set()  # that go on now, in any thread and one inside another
_before: list[tuple[int, int, int]] = []  # thresholds to go back to, where they were changed


@contextmanager
def rare_collections() -> Iterator[None]:
    """The first run changes the thresholds and the last one to end restores them, unless somebody else has
    set them meanwhile. A collector that is off or rarer still is left alone."""
    run = object()
    try:
        _begin(run)
        yield
    finally:
        _end(run)


def _begin(run: object) -> None:
    with _lock:
        young, *older = before = gc.get_threshold()
        if not _runs and gc.isenabled() and 0 < young < YOUNG:
            _before.append(before)
            gc.set_threshold(YOUNG, *older)
        _runs.add(run)


def _end(run: object) -> None:
    with _lock:
        _runs.discard(run)
        if not _runs and _before:
            before = _before.pop()
            if gc.get_threshold() == (YOUNG, *before[1:]):
                gc.set_threshold(*before)
