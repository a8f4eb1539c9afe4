"""The KV oracle as a choice: no model, every read and write of every plan is checked."""

from __future__ import annotations

from headway import OracleExecutor, Registry, hookimpl


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("executor", "oracle", OracleExecutor)
