"""Every error Headway raises on purpose. Each message says what was given, what was expected and what to do."""

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
    """A policy broke an invariant or raised. Names the plugin, the step and the request (DESIGN invariants 1-9)."""

    def __init__(self, message: str, *, plugin: str = "", step: int = -1, request: str = "", view: str = "") -> None:
        where = [f"plugin {plugin}"] if plugin else []
        where += [f"step {step}"] if step >= 0 else []
        where += [f"request {request}"] if request else []
        text = f"{', '.join(where)}: {message}" if where else message
        super().__init__(f"{text}\n{view}" if view else text)
        self.plugin, self.step, self.request = plugin, step, request


class NothingPlanned(PolicyError):
    """A scheduler planned nothing, said no time to wake, and nothing is in flight: the run would stand still for ever."""


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
