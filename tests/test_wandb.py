"""The W&B observer, read back with W&B's own reader of its offline log, or by a server of our own. Nothing here leaves this machine."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from headway import ConfigError, RunResult
from plugins.observers.wandb import SERIES, Buckets, Wandb, logged_in

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
    assert [(p["time_s"], p["engine/num_running"]) for p in buckets.points()] == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]
    assert set(buckets.points()[0]) == {"time_s", *SERIES}


@pytest.mark.parametrize("steps", [501, 10_000])
def test_a_long_series_is_averaged_into_few_points_and_keeps_its_mean(steps):
    buckets = Buckets(500)
    for i in range(steps):
        buckets.add(Step(end=i, num_running=i))
    points = buckets.points()
    assert 100 < len(points) <= 501
    assert points[-1]["time_s"] == steps - 1
    sizes = [b - a for a, b in zip([-1.0, *(p["time_s"] for p in points)], (p["time_s"] for p in points), strict=False)]
    assert sum(n * p["engine/num_running"] for n, p in zip(sizes, points, strict=True)) / steps == pytest.approx((steps - 1) / 2)


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
    with pytest.raises(ConfigError, match="tracking.mode='ofline': expected one of auto, online, offline, disabled. Did you mean offline"):
        Wandb(mode="ofline")


def test_without_the_package_a_run_goes_on_with_one_warning(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Wandb(mode="offline")
    tracker.run = SimpleNamespace()
    tracker.on_start(None)
    tracker.on_step(None)
    tracker.close(RunResult())
    warning = capsys.readouterr().err
    assert warning.startswith("warning: wandb cannot be imported") and "tracking=none" in warning and warning.count("\n") == 1


RUN = [sys.executable, str(ROOT / "run.py"), "executor=sim", "workload.num_requests=8"]


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run talks to, and a proxy that keeps what it is asked: `asked`, (path, JSON of what matters here) in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, dict]] = []

    def data(self, query: str, variables: dict) -> dict:
        if "upsertBucket" in query:
            project = {"id": "p", "name": "headway", "entity": {"id": "e", "name": "somebody"}}
            return {"upsertBucket": {"bucket": {"id": "r", "name": "n", "displayName": "d", "config": "{}", "project": project}, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:
            return {"createArtifact": {"artifact": {"id": "a", "digest": "d", "state": "COMMITTED", "artifactSequence": {"id": "s"}}}}
        if "ArtifactType" in query:
            return {"project": None}
        return {"viewer": {"id": "v", "entity": "somebody", "username": "somebody", "teams": {"edges": []}}, "serverInfo": {"features": []}}


class Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        body = json.loads(raw) if self.path == "/graphql" or self.path.endswith("/file_stream") else {}
        self.server.asked.append((self.path, body))
        answer = {"data": self.server.data(body["query"], body.get("variables") or {})} if self.path == "/graphql" else {}
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
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert server.asked == []  # without a login: no request to W&B, none to anybody through a proxy
    groups = set()
    for job, cache in enumerate(("none", "hash")):
        (folder,) = (tmp_path / "sweeps" / "night" / str(job) / "wandb").glob("offline-run-*")
        inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
        lines = subprocess.run([*inspect, str(folder)], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        run = next(r["run"] for r in records if r["type"] == "run")
        groups.add(run.get("group") or run.get("run_group"))
        assert f"cache={cache}" in run["tags"] and "executor=sim" in run["tags"]
        assert run["config"]["update"]["cache"]["name"] == cache
        points = [r["history"]["item"] for r in records if r["type"] == "history"]
        assert sum("engine/num_running" in p for p in points) == read_summary(tmp_path / "sweeps" / "night" / str(job))["num_steps"]
        assert any(p.get("requests._type") == "table-file" and p["requests.nrows"] == 8 for p in points)
        whole = subprocess.run([*inspect[:-1], "--summary", "--json", str(folder)], env=environment, capture_output=True, text=True, check=True)
        summary = json.loads(whole.stdout)
        assert summary["summary"]["p99_ttft_ms"] == pytest.approx(read_summary(tmp_path / "sweeps" / "night" / str(job))["p99_ttft_ms"])
        assert summary["exit_code"] == 0
    assert groups == {"sweeps_night"}


def test_with_a_login_config_series_and_summary_arrive_while_the_run_goes_on(tmp_path, server):
    environment = environment_of(tmp_path, server) | {"WANDB_API_KEY": "0" * 40}
    ended = subprocess.run([*RUN, "cache=radix"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0 and "warning" not in ended.stderr, ended.stderr
    (written,) = tmp_path.glob("outputs/**/summary.json")
    (run, *_) = [body["variables"] for path, body in server.asked if path == "/graphql" and "upsertBucket" in body["query"]]
    assert run["project"] == "headway" and run["displayName"] == "executor=sim workload.num_requests=8 cache=radix"
    assert "cache=radix" in run["tags"] and json.loads(run["config"])["cache"]["value"]["name"] == "radix"
    streamed = [body for path, body in server.asked if path.endswith("/file_stream")]
    rows = [json.loads(row) for body in streamed for row in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", ())]
    summary = read_summary(written.parent)
    assert sum("engine/num_running" in row for row in rows) == summary["num_steps"]
    assert any(json.loads(body["files"]["wandb-summary.json"]["content"][-1]).get("p99_ttft_ms") == pytest.approx(summary["p99_ttft_ms"])
               for body in streamed if "wandb-summary.json" in body.get("files", {}))  # fmt: skip
    assert (streamed[-1]["complete"], streamed[-1]["exitcode"]) == (True, 0)


def read_summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())
