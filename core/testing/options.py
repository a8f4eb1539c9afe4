"""Options of `pytest --pyargs core.testing --policy "order=mypaper"`. Registered as a pytest plugin, so that
they are known before collection."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("headway", "Headway's conformance kit")
    group.addoption(
        "--policy",
        default="",
        help='the policies to check, as for `python -m headway check`: "order=mypaper cache=radix"',
    )
    group.addoption(
        "--policy-module",
        action="append",
        default=[],
        help="a plugin file or module that is not installed; may be repeated",
    )
    group.addoption("--policy-seeds", type=int, default=200, help="random cases")
