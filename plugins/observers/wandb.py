"""The run in Weights & Biases: online for those who are logged in, else offline beside the run's files."""

from __future__ import annotations

import math
import netrc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlparse

from headway import Engine, Observer, RunResult, StepRecord, hookimpl, metrics, param

MODES = ("auto", "online", "offline", "disabled")
#: Step series: name -> how a bucket of steps is drawn from its records.
SERIES = {
    "engine/num_running": lambda r: r.num_running,
    "engine/num_waiting": lambda r: r.num_waiting,
    "engine/kv_used": lambda r: r.kv_used,
    "engine/kv_cached": lambda r: r.kv_cached,
    "engine/tokens_a_step": lambda r: r.plan.num_tokens,
    "engine/step_ms": lambda r: (r.end - r.start) * 1e3,
    "engine/policy_us": lambda r: r.policy_time * 1e6,
    "engine/preempted": lambda r: r.num_preempted,
}


class Buckets:
    """Means over buckets of consecutive steps. When there are too many buckets, neighbours merge: memory and points stay bounded."""

    def __init__(self, most: int) -> None:
        self.most, self.size = max(2, most), 1
        self.rows: list[list[float]] = []  # steps, end of the last one, sum of each series
        self._open: list[float] = []

    def add(self, record: StepRecord) -> None:
        values = [1.0, record.end, *(read(record) for read in SERIES.values())]
        self._open = _merged(self._open, values) if self._open else values
        if self._open[0] >= self.size:
            self.rows.append(self._open)
            self._open = []
            if len(self.rows) > self.most:
                rows, self.size = self.rows, self.size * 2
                self.rows = [_merged(*rows[i : i + 2]) if i + 1 < len(rows) else rows[i] for i in range(0, len(rows), 2)]

    def points(self) -> list[dict[str, float]]:
        rows = [*self.rows, self._open] if self._open else self.rows
        return [{"time_s": end} | {name: total / steps for name, total in zip(SERIES, sums, strict=True)} for steps, end, *sums in rows]


def _merged(a: list[float], b: list[float]) -> list[float]:
    return [a[0] + b[0], b[1], *(x + y for x, y in zip(a[2:], b[2:], strict=True))]


@dataclass
class Wandb(Observer):
    """Weights & Biases: config, summary, step series, a table of requests. Offline without a login; `wandb sync` sends it later.

    mode: auto (online with a login, else offline), online, offline or disabled; WANDB_MODE overrides auto.
    max_points: points of a step series; steps between two points are averaged.
    max_rows: rows of the request table, the first ones to arrive.
    """

    project: str = "headway"
    entity: str | None = None
    mode: str = param("auto", choices=MODES)
    max_points: int = param(500, min=2, max=1_000_000)
    max_rows: int = param(1000, min=0, max=1_000_000)

    run: ClassVar[Any] = None  # the Run, set on the object by the composition

    def on_start(self, engine: Engine) -> None:
        """Before the run's clock starts: importing and starting W&B takes seconds. A tracker that fails stops no run."""
        self._buckets = Buckets(self.max_points)
        self._wandb: Any = None
        run, mode = self.run, self._mode()
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports would ask the network
        try:
            import wandb
        except ImportError as error:
            _warn(f"wandb cannot be imported ({error})")
            return
        choices = run.composition.choices
        tags = [f"{role}={choices[role][0]}" for role in ("scheduler", "order", "cache", "executor", "workload") if role in choices]
        try:
            self._wandb = wandb.init(
                project=self.project, entity=self.entity, mode=mode, dir=str(run.directory or Path()), config=run.config, name=run.name[:120],
                group=run.group or None, job_type="sweep" if run.group else "run", tags=[t[:64] for t in tags], reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True),
            )  # fmt: skip
            self._wandb.define_metric("engine/*", step_metric="time_s")
        except Exception as error:  # no account, no network, a full disk
            _warn(f"wandb cannot be started ({error})")

    def _mode(self) -> str:
        if self.mode != "auto":
            return self.mode
        return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")

    def on_step(self, record: StepRecord) -> None:
        if self._wandb is not None:
            self._buckets.add(record)

    def close(self, result: RunResult) -> None:
        if (tracker := self._wandb) is None:
            return
        self._wandb = None
        summary = {k: v for k, v in metrics.summarize(result).items() if not (isinstance(v, float) and math.isnan(v))}
        try:
            for point in self._buckets.points():
                tracker.log(point)
            tracker.summary.update(summary)
            tracker.log({"requests": self._table(result)})
        except Exception as error:
            _warn(f"wandb failed ({error})")
        finally:
            tracker.finish(exit_code=0 if result.status == "finished" else 1)

    def _table(self, result: RunResult) -> Any:
        import wandb

        columns = ["id", "state", "client", "arrival_s", "prompt", "cached", "output", "ttft_ms", "tpot_ms", "e2el_ms", "preemptions", "reason"]
        rows = [
            [o.id, o.state, o.tags.client, o.arrival_time, o.num_prompt_tokens, o.num_cached_tokens, len(o.token_times)]
            + [None if (v := f(o)) is None else v * 1e3 for f in (metrics.ttft, metrics.tpot, metrics.e2el)]
            + [o.num_preemptions, o.finish_reason]
            for o in result.outputs[: self.max_rows]
        ]
        return wandb.Table(columns=columns, data=rows)


def _warn(problem: str) -> None:
    print(f"warning: {problem}; nothing is tracked. Set tracking=none to silence this", file=sys.stderr)


def logged_in() -> bool:
    """Whether W&B would find a key: in the environment, or in netrc for its host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return host in netrc.netrc(os.environ.get("NETRC") or None).hosts
    except (OSError, netrc.NetrcParseError):
        return False


@hookimpl
def headway_register(registry):
    registry.add("tracking", "wandb", Wandb)
