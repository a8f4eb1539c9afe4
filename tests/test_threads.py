"""torch on shared cores: what is set before it is loaded, and how many threads it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.executors.torch import threads

ROOT = Path(__file__).resolve().parent.parent
READ = "{first}; import os, sys; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"


@pytest.mark.parametrize(
    "first", ["import plugins.executors.torch", "from headway import load_registry; load_registry()"]
)
@pytest.mark.parametrize(("given", "then"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(first, given, then):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    shown = subprocess.run(
        [sys.executable, "-c", READ.format(first=first)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == ["False", then]  # set while torch is not loaded yet


@pytest.mark.parametrize(
    ("quota", "allowed", "expected"),
    [
        ("max 100000", 8, 8),
        ("250000 100000", 8, 3),
        ("50000 100000", 8, 1),
        ("1600000 100000", 8, 8),
        (None, 8, 8),
        ("gibberish", 2, 2),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_the_containers_quota(
    tmp_path, monkeypatch, quota, allowed, expected
):
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert threads.cores() == expected


@pytest.mark.parametrize(("given", "then"), [(None, [3]), ("16", [])])
def test_torch_gets_no_more_threads_than_cores_unless_the_user_says_how_many(monkeypatch, given, then):
    import torch

    taken: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(threads, "cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    threads.limit_threads()
    assert taken == then
