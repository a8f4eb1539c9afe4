"""The run in Weights & Biases: online for those who are logged in, else offline beside the run's files."""

from __future__ import annotations

import math
import netrc
import os
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import urlopen

from headway import (
    Engine,
    Observer,
    Registry,
    RunResult,
    StepColumns,
    StepRecord,
    hookimpl,
    metrics,
    param,
)

# seconds that wandb's own process may take to start on a busy machine, beside what a server takes
STARTING = 20.0
MODES = ("auto", "online", "offline", "disabled")
#: Step series: name -> how it is read of a step's record, or of many steps' columns in its place.
SERIES: dict[str, Callable[[Any], Any]] = {
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
    """Means over buckets of consecutive steps. When there are too many buckets, neighbours merge: memory and
    points stay bounded."""

    def __init__(self, most: int) -> None:
        self.most, self.size = max(2, most), 1
        self.rows: list[list[float]] = []  # steps, end of the last one, sum of each series
        self._open: list[float] = []

    def add(self, record: StepRecord) -> None:
        self._add([1.0, record.end, *(read(record) for read in SERIES.values())])

    def add_all(self, numbers: dict[str, Any]) -> None:
        """Many steps, as columns by name."""
        plan = SimpleNamespace(num_tokens=numbers["num_tokens"])
        columns = SimpleNamespace(plan=plan, **numbers)
        series = [read(columns).tolist() for read in SERIES.values()]
        for end, *values in zip(numbers["end"].tolist(), *series, strict=True):
            self._add([1.0, end, *values])

    def _add(self, values: list[float]) -> None:
        self._open = _merged(self._open, values) if self._open else values
        if self._open[0] >= self.size:
            self.rows.append(self._open)
            self._open = []
            if len(self.rows) > self.most:
                rows, self.size = self.rows, self.size * 2
                self.rows = [
                    _merged(*rows[i : i + 2]) if i + 1 < len(rows) else rows[i]
                    for i in range(0, len(rows), 2)
                ]

    def points(self) -> list[dict[str, float]]:
        rows = [*self.rows, self._open] if self._open else self.rows
        return [
            {"time_s": end} | {name: total / steps for name, total in zip(SERIES, sums, strict=True)}
            for steps, end, *sums in rows
        ]


def _merged(a: list[float], b: list[float]) -> list[float]:
    return [a[0] + b[0], b[1], *(x + y for x, y in zip(a[2:], b[2:], strict=True))]


@dataclass
class Wandb(Observer):
    """Weights & Biases: config, summary, step series, a table of requests. Offline without a login; `wandb
    sync` sends it later.

    mode: auto (online with a login, else offline), online, offline or disabled; WANDB_MODE overrides auto.
    max_points: points of a step series; steps between two points are averaged.
    max_rows: rows of the request table, the first ones to arrive.
    timeout: seconds to reach the server when the run starts; after that the run is kept offline.
    finish_timeout: seconds to send what is left when the run ends; what is not sent then stays on disk.
    """

    project: str = "headway"
    entity: str | None = None
    mode: str = param("auto", choices=MODES)
    max_points: int = param(500, min=2, max=1_000_000)
    max_rows: int = param(1000, min=0, max=1_000_000)
    timeout: float = param(5.0, above=0, max=3600, unit="seconds", doc="to reach the server at the start")
    finish_timeout: float = param(
        30.0, above=0, max=86_400, unit="seconds", doc="to send what is left at the end"
    )

    run: ClassVar[Any] = None

    def on_build(self, run: Any) -> None:
        self.run = run  # type: ignore[misc]

    def on_start(self, engine: Engine) -> None:
        """Before the run's clock starts: importing and starting W&B takes seconds. A tracker that fails stops
        no run."""
        self._buckets = Buckets(self.max_points)
        self._wandb: Any = None
        mode, left = self._mode(), self.timeout
        if mode == "online":
            began = time.monotonic()
            if problem := unreachable(base_url(), self.timeout):
                mode = self._offline(f"W&B cannot be reached at {base_url()} ({problem})")
            left = max(1.0, self.timeout - (time.monotonic() - began))
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            cure = '`pip install -e ".[wandb]"`, or set tracking=none to silence this'
            _warn(f"wandb cannot be imported ({error}); nothing is tracked: {cure}")
            return
        self._wandb = self._started(mode, left)

    def _started(self, mode: str, timeout: float) -> Any:
        """A run of W&B, offline where the server does not take one within so many seconds; None where that
        fails as well."""
        import wandb

        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports would ask the network
        run = self.run
        choices = run.composition.choices
        tags = [
            f"{role}={choices[role][0]}"
            for role in ("scheduler", "order", "cache", "executor", "workload")
            if role in choices
        ]
        limits: dict[str, Any] = {
            "init_timeout": timeout,
            "finish_timeout": self.finish_timeout,
            "finish_timeout_raises": True,
        }
        # the versions differ
        known = {name: value for name, value in limits.items() if name in wandb.Settings.model_fields}
        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True, **known
        )
        made: list[Any] = []
        how: Any = mode  # one of MODES, which W&B has as literals

        def start() -> None:
            made.append(
                wandb.init(
                    project=self.project,
                    entity=self.entity,
                    mode=how,
                    dir=str(run.directory or Path()),
                    config=run.config,
                    name=run.name[:120],
                    group=run.group or None,
                    job_type="sweep" if run.group else "run",
                    tags=[t[:64] for t in tags],
                    reinit="finish_previous",
                    settings=settings,
                )
            )
            made[0].define_metric("engine/*", step_metric="time_s")

        try:
            _bounded(start, timeout + STARTING)
        # a key that is refused, no account, a server that does not answer, a full disk
        except Exception as error:
            if mode == "online":
                return self._started(self._offline(f"W&B does not take the run ({_line(error)})"), timeout)
            _warn(
                f"wandb cannot be started ({_line(error)}); nothing is tracked. Set tracking=none to silence "
                "this"
            )
            return None
        return made[0]

    def _offline(self, problem: str) -> str:
        _warn(f"{problem}; the run is kept offline, and `wandb sync {self._folder()}/offline-run-*` sends it")
        return "offline"

    def _folder(self) -> Path:
        return Path(self.run.directory or "") / "wandb"

    def _mode(self) -> str:
        if self.mode != "auto":
            return self.mode
        return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")

    def on_step(self, record: StepRecord) -> None:
        if self._wandb is not None:
            self._buckets.add(record)

    def on_steps(self, steps: StepColumns) -> None:
        """Many steps at once, of a compiled run."""
        if self._wandb is not None:
            self._buckets.add_all(steps.numbers)

    def close(self, result: RunResult) -> None:
        """Numbers first, which W&B writes to a log on disk; then what may need the server, for so many
        seconds and no longer."""
        tracker, self._wandb = self._wandb, None
        if tracker is None:
            return
        deadline = time.monotonic() + self.finish_timeout
        exit_code = 0 if result.status == "finished" else 1
        try:
            _bounded(lambda: self._numbers(tracker, result), self.finish_timeout)
        except Exception as error:
            self._send_again(result, error)
            return
        try:
            _bounded(lambda: tracker.log({"requests": self._table(result)}), deadline - time.monotonic())
            left = max(1.0, deadline - time.monotonic()) + 1  # wandb's own limit comes first
            _bounded(lambda: tracker.finish(exit_code=exit_code), left)
        except ConnectionError as error:  # its process is gone, and the numbers that it took perhaps as well
            self._send_again(result, error)
        except Exception as error:
            _warn(
                f"W&B did not take everything ({_line(error)}); `wandb sync {self._folder()}/*run-*` sends "
                "what is missing"
            )

    def _numbers(self, tracker: Any, result: RunResult) -> None:
        for point in self._buckets.points():
            tracker.log(point)
        tracker.summary.update(
            {
                k: v
                for k, v in metrics.summarize(result).items()
                if not (isinstance(v, float) and math.isnan(v))
            }
        )

    def _send_again(self, result: RunResult, error: Exception) -> None:
        """W&B failed before it had the numbers: another run holds them, offline."""
        import wandb

        self._offline(f"wandb failed ({_line(error)})")
        with suppress(Exception):
            # its process may be what failed; the next run starts another
            _bounded(wandb.teardown, self.timeout)
        if (again := self._started("offline", self.timeout)) is None:
            return
        try:
            _bounded(lambda: self._numbers(again, result), self.finish_timeout)
            _bounded(again.finish, self.finish_timeout)
        except Exception as second:
            _warn(
                f"wandb failed again ({_line(second)}); the numbers are in {self.run.directory}, not in W&B"
            )

    def _table(self, result: RunResult) -> Any:
        import wandb

        named = "id state client arrival_s prompt cached output ttft_ms tpot_ms e2el_ms preemptions reason"
        columns: list[str | int] = [*named.split()]
        rows = [
            [
                o.id,
                o.state,
                o.tags.client,
                o.arrival_time,
                o.num_prompt_tokens,
                o.num_cached_tokens,
                len(o.token_times),
            ]
            + [None if (v := f(o)) is None else v * 1e3 for f in (metrics.ttft, metrics.tpot, metrics.e2el)]
            + [o.num_preemptions, o.finish_reason]
            for o in result.outputs[: self.max_rows]
        ]
        return wandb.Table(columns=columns, data=rows)


def _warn(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr)


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _bounded(function: Callable[[], Any], seconds: float) -> None:
    """Calls what may hang. Raises what it raises, and TimeoutError when it has not come back; its thread is
    left behind."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:g} s")
    if raised:
        raise raised[0]


# ---- the server ------------------------------------------------------------------------------------------


def base_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def unreachable(url: str, timeout: float) -> str:
    """Why nobody answers there, through the proxies of the environment; "" where somebody does, whatever the
    answer is."""

    def ask() -> None:
        try:
            urlopen(url, timeout=timeout).close()
        except HTTPError:
            pass  # an answer
        except URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # wandb may know other certificates
                raise

    try:
        _bounded(ask, timeout)  # a name that nobody resolves takes longer than urlopen's own limit
    except (OSError, ValueError, HTTPException) as error:
        return _line(error)
    return ""


def logged_in() -> bool:
    """Whether W&B would find a key: in the environment, or in netrc for its host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(base_url()).hostname or ""
    try:
        return host in netrc.netrc(os.environ.get("NETRC") or None).hosts
    except (OSError, netrc.NetrcParseError):
        return False


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("tracking", "wandb", Wandb)
