"""The live line of a run: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from headway import Engine, Observer, Request, Run, RunResult, StepColumns, StepRecord, hookimpl


class Progress(Observer):
    """Requests done, tokens/s, running and waiting, KV use. Draws ten times a second at most; a step costs
    one clock reading."""

    def __init__(self, total: int | None) -> None:
        self.total = total  # requests that the workload will bring, where it knows
        self.interval = 0.1 if sys.stderr.isatty() else 5.0  # seconds between two drawings

    def on_start(self, engine: Engine) -> None:
        self._engine = engine
        self._done = self._tokens = self._seen = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                BarColumn(40),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        self._drawn = self._began = time.monotonic()

    def on_step(self, record: StepRecord) -> None:
        self._stepped(record.emitted, record)

    def on_steps(self, steps: StepColumns) -> None:
        """Many steps at once, of a compiled run."""
        numbers = steps.numbers
        if len(numbers["step"]):
            last = {
                name: numbers[name][-1].item() for name in ("num_running", "num_waiting", "kv_used", "end")
            }
            self._stepped(int(numbers["emitted"].sum()), SimpleNamespace(**last))

    def _stepped(self, emitted: int, last: Any) -> None:
        self._tokens += emitted
        if time.monotonic() - self._drawn >= self.interval:
            self._draw(last)

    def on_requests(self, finished: Sequence[Request]) -> None:
        self._done += len(finished)

    def _draw(self, record: Any) -> None:
        now = time.monotonic()
        rate = (self._tokens - self._seen) / max(now - self._drawn, 1e-9)
        self._drawn, self._seen = now, self._tokens
        kv = record.kv_used / self._engine.pool.num_blocks
        line = (
            f"{rate:,.0f} tok/s, running {record.num_running}, waiting {record.num_waiting}, KV {kv:.0%}, "
            f"t={record.end:,.1f} s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=line)
        else:
            print(
                f"{self._done}{f'/{self.total}' if self.total else ''} requests, {line}",
                file=sys.stderr,
                flush=True,
            )

    def close(self, result: RunResult) -> None:
        if self._bar is not None:
            self._bar.stop()


@hookimpl
def headway_observers(run: Run) -> Sequence[Observer]:
    return [Progress(getattr(run.roles.get("workload"), "num_requests", None))] if run.directory else []
