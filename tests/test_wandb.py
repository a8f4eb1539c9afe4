"""The W&B observer, read back with W&B's own reader of its offline log, or by a server of our own. Nothing
here leaves this machine."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest

from headway import ConfigError, RunResult
from plugins.observers.wandb import SERIES, Buckets, Wandb, logged_in, unreachable

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Step:
    """What Buckets reads of a StepRecord."""

    end: float
    num_running: int
    start: float = 0.0
    num_waiting: int = 0
    kv_used: int = 0
    kv_cached: int = 0
    policy_time: float = 0.0
    num_preempted: int = 0
    plan: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(num_tokens=0))


def test_a_short_series_is_kept_as_it_is():
    buckets = Buckets(100)
    for i in range(5):
        buckets.add(Step(end=i, num_running=i * i))
    assert [(p["time_s"], p["engine/num_running"]) for p in buckets.points()] == [
        (0, 0),
        (1, 1),
        (2, 4),
        (3, 9),
        (4, 16),
    ]
    assert set(buckets.points()[0]) == {"time_s", *SERIES}


@pytest.mark.parametrize("steps", [501, 10_000])
def test_a_long_series_is_averaged_into_few_points_and_keeps_its_mean(steps):
    buckets = Buckets(500)
    for i in range(steps):
        buckets.add(Step(end=i, num_running=i))
    points = buckets.points()
    assert 100 < len(points) <= 501
    assert points[-1]["time_s"] == steps - 1
    sizes = [
        b - a
        for a, b in zip([-1.0, *(p["time_s"] for p in points)], (p["time_s"] for p in points), strict=False)
    ]
    assert sum(
        n * p["engine/num_running"] for n, p in zip(sizes, points, strict=True)
    ) / steps == pytest.approx((steps - 1) / 2)


def test_a_login_is_a_key_in_the_environment_or_an_entry_in_netrc(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "http://our.server:8080")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logged_in()


def test_an_unknown_mode_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError,
        match="tracking.mode='ofline': expected one of auto, online, offline, disabled. Did you mean offline",
    ):
        Wandb(mode="ofline")


def test_without_the_package_a_run_goes_on_with_one_warning(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Wandb(mode="offline")
    tracker.run = SimpleNamespace()
    tracker.on_start(None)
    tracker.on_step(None)
    tracker.close(RunResult())
    warning = capsys.readouterr().err
    assert (
        warning.startswith("warning: wandb cannot be imported")
        and "tracking=none" in warning
        and warning.count("\n") == 1
    )


# ---- when W&B fails --------------------------------------------------------------------------------------


class FakeRun:
    """What a Wandb observer calls of a run, each call written down; `fails`: method -> what it does
    instead."""

    def __init__(self, mode: str, calls: list[tuple], fails: dict) -> None:
        self.mode, self.calls, self.fails = mode, calls, fails
        self.summary = SimpleNamespace(update=lambda values: self._call("summary", values))

    def _call(self, name: str, *given: object) -> None:
        self.calls.append((self.mode, name))
        if (self.mode, name) in self.fails:
            self.fails[self.mode, name]()

    def log(self, point: dict) -> None:
        self._call("table" if "requests" in point else "log", point)

    def finish(self, exit_code: int = 0) -> None:
        self._call("finish")

    def define_metric(self, *about: object, **more: object) -> None: ...


@pytest.fixture
def fake(monkeypatch):
    """A wandb that answers `calls`, in order, and fails where `fails` says so."""
    calls, fails, left = [], {}, Event()

    def init(mode: str, **about: object) -> FakeRun:
        made = FakeRun(mode, calls, fails)
        made._call("init")
        return made

    class Settings:
        model_fields = ("init_timeout", "finish_timeout")

        def __init__(self, **settings: object) -> None: ...

    module = SimpleNamespace(
        init=init, Settings=Settings, Table=lambda **about: "table", teardown=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("plugins.observers.wandb.unreachable", lambda url, timeout: "")
    yield SimpleNamespace(calls=calls, fails=fails, hang=left.wait)
    left.set()


def tracked(folder: Path, **parameters: object) -> None:
    """A run of one step under a tracker that is logged in."""
    tracker = Wandb(**{"mode": "online", "timeout": 0.2, "finish_timeout": 0.5} | parameters)
    composition = SimpleNamespace(choices={"order": ("fcfs", {})})
    tracker.run = SimpleNamespace(directory=folder, config={}, name="x", group="", composition=composition)
    tracker.on_start(None)
    tracker.on_step(Step(end=1.0, num_running=1))
    tracker.close(RunResult())


def raising() -> None:
    raise RuntimeError("planted\nand more")


SENT = ["init", "log", "summary", "table", "finish"]


def test_nothing_is_said_when_nothing_fails(fake, tmp_path, capsys):
    tracked(tmp_path)
    assert fake.calls == [("online", name) for name in SENT]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("where", "then", "words"),
    [
        ("init", [("offline", name) for name in SENT], "W&B does not take the run (planted)"),
        (
            "log",
            [("offline", name) for name in ("init", "log", "summary", "finish")],
            "wandb failed (planted)",
        ),
        (
            "summary",
            [("offline", name) for name in ("init", "log", "summary", "finish")],
            "wandb failed (planted)",
        ),
        ("table", [], "W&B did not take everything (planted)"),
        ("finish", [], "W&B did not take everything (planted)"),
    ],
)
def test_what_wandb_refuses_is_kept_offline_with_one_line_that_says_how_to_send_it(
    fake, tmp_path, capsys, where, then, words
):
    fake.fails["online", where] = raising
    tracked(tmp_path)
    assert fake.calls == [("online", name) for name in SENT[: SENT.index(where) + 1]] + then
    warning = capsys.readouterr().err
    assert words in warning and f"wandb sync {tmp_path}/wandb/" in warning and warning.count("\n") == 1


@pytest.mark.parametrize("where", ["log", "table", "finish"])
def test_a_wandb_that_hangs_holds_nobody_up(fake, tmp_path, capsys, where):
    fake.fails["online", where] = fake.hang
    began = time.monotonic()
    tracked(tmp_path)
    assert time.monotonic() - began < 10
    assert "no answer in" in capsys.readouterr().err


def test_a_wandb_that_fails_offline_too_stops_no_run(fake, tmp_path, capsys):
    fake.fails |= {("online", "log"): raising, ("offline", "init"): raising}
    tracked(tmp_path)
    assert "wandb cannot be started (planted)" in capsys.readouterr().err


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_is_reached_when_it_answers_at_all(server, silent, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert unreachable(server.url, 5.0) == ""
    assert unreachable(silent, 0.2) in ("no answer in 0.2 s", "timed out")
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    assert "refused" in unreachable(url, 5.0)
    assert "unknown url type" in unreachable("what://is.this", 5.0)


def test_with_a_key_and_no_network_the_run_is_kept_offline_after_seconds(tmp_path, server, silent):
    environment = environment_of(tmp_path, server) | {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": silent,
        "no_proxy": "127.0.0.1",
    }
    command = [*RUN, "tracking.timeout=0.5"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=80
    )
    assert ended.returncode == 0, ended.stderr
    (said,) = [line for line in ended.stderr.splitlines() if line.startswith("warning")]
    assert said.startswith(f"warning: W&B cannot be reached at {silent}") and "wandb sync" in said
    assert list(tmp_path.glob("outputs/*/*/wandb/offline-run-*/*.wandb"))


def wandb_processes() -> list[int]:
    """W&B's own among the children of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()) and "wandb" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds wandb's process in /proc")
@pytest.mark.parametrize("taken", [False, True])
def test_the_numbers_outlive_wandbs_own_process(tmp_path, capsys, monkeypatch, taken):
    """Also when they went into a socket that nobody read any more."""
    send, sent = Wandb._numbers, []

    def numbers(self, run, result):
        sent.append(run)
        if len(sent) > taken:
            send(self, run, result)

    monkeypatch.setattr(Wandb, "_numbers", numbers)
    tracker = Wandb(mode="offline")
    tracker.run = SimpleNamespace(
        directory=tmp_path, config={}, name="x", group="", composition=SimpleNamespace(choices={})
    )
    tracker.on_start(None)
    (process,) = wandb_processes()
    os.kill(process, signal.SIGKILL)
    tracker.on_step(Step(end=1.0, num_running=1))
    tracker.close(RunResult())
    assert "wandb failed" in capsys.readouterr().err
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


RUN = [sys.executable, str(ROOT / "run.py"), "executor=sim", "workload.num_requests=8"]


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run talks to, and a proxy that keeps what it is asked: `asked`, (path,
    JSON of what matters here) in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, dict]] = []

    def data(self, query: str, variables: dict) -> dict:
        if "upsertBucket" in query:
            project = {"id": "p", "name": "headway", "entity": {"id": "e", "name": "somebody"}}
            return {
                "upsertBucket": {
                    "bucket": {
                        "id": "r",
                        "name": "n",
                        "displayName": "d",
                        "config": "{}",
                        "project": project,
                    },
                    "inserted": True,
                }
            }
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:
            return {
                "createArtifact": {
                    "artifact": {
                        "id": "a",
                        "digest": "d",
                        "state": "COMMITTED",
                        "artifactSequence": {"id": "s"},
                    }
                }
            }
        if "ArtifactType" in query:
            return {"project": None}
        return {
            "viewer": {"id": "v", "entity": "somebody", "username": "somebody", "teams": {"edges": []}},
            "serverInfo": {"features": []},
        }


class Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        body = json.loads(raw) if self.path == "/graphql" or self.path.endswith("/file_stream") else {}
        self.server.asked.append((self.path, body))
        answer = (
            {"data": self.server.data(body["query"], body.get("variables") or {})}
            if self.path == "/graphql"
            else {}
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_PUT = do_CONNECT = do_POST

    def log_message(self, *about: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def environment_of(folder: Path, server: Server) -> dict[str, str]:
    """No login; whoever asks W&B, or anybody else through HTTP, asks `server`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k.lower() != "no_proxy"}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), server.url)
    own = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("DATA", "CACHE", "CONFIG")}
    return kept | proxies | own | {"NETRC": str(folder / "none"), "WANDB_BASE_URL": server.url}


def test_the_runs_of_a_sweep_share_a_group_and_hold_config_summary_series_and_table(tmp_path, server):
    environment = environment_of(tmp_path, server)
    command = [*RUN, "-m", "cache=none,hash", "hydra.sweep.dir=sweeps/night"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert server.asked == []  # without a login: no request to W&B, none to anybody through a proxy
    groups = set()
    for job, cache in enumerate(("none", "hash")):
        (folder,) = (tmp_path / "sweeps" / "night" / str(job) / "wandb").glob("offline-run-*")
        inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
        lines = subprocess.run(
            [*inspect, str(folder)], env=environment, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        run = next(r["run"] for r in records if r["type"] == "run")
        groups.add(run.get("group") or run.get("run_group"))
        assert f"cache={cache}" in run["tags"] and "executor=sim" in run["tags"]
        assert run["config"]["update"]["cache"]["name"] == cache
        points = [r["history"]["item"] for r in records if r["type"] == "history"]
        assert (
            sum("engine/num_running" in p for p in points)
            == read_summary(tmp_path / "sweeps" / "night" / str(job))["num_steps"]
        )
        assert any(p.get("requests._type") == "table-file" and p["requests.nrows"] == 8 for p in points)
        whole = subprocess.run(
            [*inspect[:-1], "--summary", "--json", str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        summary = json.loads(whole.stdout)
        assert summary["summary"]["p99_ttft_ms"] == pytest.approx(
            read_summary(tmp_path / "sweeps" / "night" / str(job))["p99_ttft_ms"]
        )
        assert summary["exit_code"] == 0
    assert groups == {"sweeps_night"}


def test_with_a_login_config_series_and_summary_arrive_while_the_run_goes_on(tmp_path, server):
    environment = environment_of(tmp_path, server) | {"WANDB_API_KEY": "0" * 40}
    ended = subprocess.run(
        [*RUN, "cache=radix"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0 and "warning" not in ended.stderr, ended.stderr
    (written,) = tmp_path.glob("outputs/**/summary.json")
    (run, *_) = [
        body["variables"]
        for path, body in server.asked
        if path == "/graphql" and "upsertBucket" in body["query"]
    ]
    assert (
        run["project"] == "headway"
        and run["displayName"] == "executor=sim workload.num_requests=8 cache=radix"
    )
    assert "cache=radix" in run["tags"] and json.loads(run["config"])["cache"]["value"]["name"] == "radix"
    streamed = [body for path, body in server.asked if path.endswith("/file_stream")]
    rows = [
        json.loads(row)
        for body in streamed
        for row in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", ())
    ]
    summary = read_summary(written.parent)
    assert sum("engine/num_running" in row for row in rows) == summary["num_steps"]
    assert any(
        json.loads(body["files"]["wandb-summary.json"]["content"][-1]).get("p99_ttft_ms")
        == pytest.approx(summary["p99_ttft_ms"])
        for body in streamed
        if "wandb-summary.json" in body.get("files", {})
    )
    assert (streamed[-1]["complete"], streamed[-1]["exitcode"]) == (True, 0)


def read_summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())
