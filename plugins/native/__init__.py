"""The compiled twin of a simulated run: the engine's loop with the box's simplest policies, every step of
it, in C++.

Python is the reference. A run that has a twin (twins.py) takes the same decisions at the same times, to the
bit; `engine.native` says whether it may, and `loop` in the summary which one it was.
`python -m plugins.native.build` compiles what lies in source/.
"""

from __future__ import annotations

from typing import Any

from headway import Run, hookimpl


@hookimpl
def headway_stand_in(run: Run) -> Any:
    from . import library, twins

    if problem := twins.missing(run) or library.missing():
        return problem
    from .loop import NativeLoop

    return NativeLoop(run, library.load())
