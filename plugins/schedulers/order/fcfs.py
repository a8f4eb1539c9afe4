"""First come, first served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway import Order, Registry, Request, View, hookimpl


@dataclass
class FirstCome(Order):
    """By arrival; preempted requests are as old as they are."""

    def order(self, view: View) -> Iterable[Request]:
        return view.waiting


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "fcfs", FirstCome)
