"""Every error Headway raises on purpose. Each message says what was given, what was expected and what to
do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadwayError(Exception):
    """Base class: `run.py` prints these without a traceback."""


class ConfigError(HeadwayError):
    """The composition makes no sense; raised before any weight is loaded."""


class PluginError(HeadwayError):
    """A plugin cannot be used: broken import, wrong interface, taken name."""


class PolicyError(HeadwayError):
    """A policy broke an invariant or raised. Names the plugin, the step and the request, and shows the
    view."""

    def __init__(
        self, message: str, *, plugin: str = "", step: int = -1, request: str = "", view: str = ""
    ) -> None:
        super().__init__(message)
        self.message, self.plugin, self.step, self.request, self.view = message, plugin, step, request, view

    def locate(self, step: int, view: str) -> None:
        """Says where it was raised, for one who could not know."""
        self.step = step if self.step < 0 else self.step
        self.view = view

    def __str__(self) -> str:
        where = [f"plugin {self.plugin}"] if self.plugin else []
        where += [f"step {self.step}"] if self.step >= 0 else []
        where += [f"request {self.request}"] if self.request else []
        text = f"{', '.join(where)}: {self.message}" if where else self.message
        return f"{text}\n{self.view}" if self.view else text


class NothingPlanned(PolicyError):
    """The scheduler planned nothing, set no wake-up time, and nothing is in flight, so the run cannot
    progress."""

    def __init__(self, scheduler: str, step: int, view: str) -> None:
        message = (
            "planned nothing although requests wait and nothing is in flight: add one, reject one, or say "
            "step.wake_at(t)"
        )
        super().__init__(message, plugin=scheduler, step=step, view=view)


class InvariantError(HeadwayError):
    """The core's own book-keeping is inconsistent: a bug in core, or state changed behind its back."""


class WorkloadError(HeadwayError):
    """A workload or trace cannot be read; names the file and the line."""


class ModelError(HeadwayError):
    """A checkpoint cannot be loaded or run; names the tensor or the field."""


class RankError(HeadwayError):
    """A rank of a parallel run died, raised or hangs; names the rank and the cause."""


def near(name: str, options: Iterable[str]) -> str:
    """' Did you mean ...?' for a misspelt name, or the whole list when nothing is close."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {', '.join(close)}?"
    return f" Available: {', '.join(options) or '(none)'}."
