"""Attained service along a program's critical path."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Context, Registry, Request, hookimpl

from .plas import Call, ProgramService


@dataclass
class CriticalPath(ProgramService):
    """Autellix (Luo et al., arXiv 2502.13965, section 4): ATLAS, the call with the shortest chain of calls
    before it goes first.

    Order plas for programs whose calls run in parallel: a call stands where the longest chain of calls before
    it ends, by the service that they had, instead of where all of its program's do. The chain follows
    `tags.parents`; a call that names none, but is not its program's first turn, waited for all that have
    ended. Parameters are those of order=plas.
    """

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        # session -> id of a completed call -> seconds up to its end
        self._paths: dict[str, dict[str, float]] = {}

    def standing(self, request: Request) -> float:
        paths = self._paths.get(request.tags.session, {})
        if request.tags.parents:
            return max(paths.get(parent, 0.0) for parent in request.tags.parents)
        return max(paths.values(), default=0.0) if request.tags.turn else 0.0

    def completed(self, request: Request, call: Call) -> None:
        if request.tags.session:
            path = self.standing(request) + call.served
            self._paths.setdefault(request.tags.session, {})[request.id] = path
        super().completed(request, call)


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "atlas", CriticalPath)
