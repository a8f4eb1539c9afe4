"""First come, first served among programs."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, KeyOrder, Registry, Request, hookimpl


@dataclass
class ProgramFirstCome(KeyOrder):
    """Continuum's program-level FCFS (Li et al., arXiv 2511.02230, section 4): the request whose program came
    first goes first.

    A program is a session (tags.session), and came when its first request did; a request without a session is
    a program of its own. So the next turn of an agent does not queue behind agents that came after it.
    Programs are never forgotten: a few words a session.
    """

    may_starve = "a program that never ends is served before all that came after it"

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._came: dict[str, tuple[float, int]] = {}  # session -> the place of its first request

    def key(self, request: Request) -> tuple[float, int]:
        session = request.tags.session
        return self._came.setdefault(session, request.sort_key) if session else request.sort_key


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "program_fcfs", ProgramFirstCome)
