"""Everybody is admitted."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Admission, Admit, Registry, Request, View, hookimpl


@dataclass
class Always(Admission):
    """Admits every request, a baseline; the same decisions as admission=none."""

    def admit(self, request: Request, view: View) -> Admit:
        return Admit()


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("admission", "always", Always)
