"""Same seed, same decisions: across processes, hash seeds and clocks, for whole compositions and for the
command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.testing.subject import Subject
from core.testing.worker import VARIANTS, Workers

ROOT = Path(__file__).resolve().parent.parent
#: Between them: every scheduler, cache and kind of bookkeeping that iterates over something.
COMPOSITIONS = (
    "",
    "scheduler=chunked order=vtc cache=hash eviction=lru",
    "scheduler=pd_split order=dlpm cache=radix eviction=s3fifo",
    "scheduler=fcfs order=plas cache=radix eviction=arc victim=lcf",
    "scheduler=preemptive order=srpt predictor=history cache=hash eviction=gdsf",
    "scheduler=chunked order=dfs_weight cache=radix eviction=workload_aware retention=ttl "
    "admission=past_future",
    "scheduler=chunked order=random victim=random chunk=dynamic_chunk cache=hash eviction=two_q",
)


@pytest.fixture(scope="module")
def workers():
    with Workers() as running:
        yield running


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_the_same_case_is_decided_alike_in_every_process(composition: str, workers: Workers) -> None:
    words = tuple(composition.split())
    subject = Subject(words)
    subject.refuse_what_cannot_be()
    for seed in range(12):
        answers = workers.run(words, subject.case(seed))
        assert answers["base"].failure == ""
        assert len({answer.decision_hash for answer in answers.values()}) == 1, {
            v: a.decision_hash for v, a in answers.items()
        }


def test_the_processes_do_differ_in_what_must_not_matter() -> None:
    """Else the test above could not fail."""
    assert len({hash_seed for hash_seed, _, _ in VARIANTS.values()}) == 3
    orders = set()
    for seed in ("0", "1", "2"):
        code = "print(list({f'r{i}' for i in range(12)}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        orders.add(done.stdout)
    assert len(orders) == 3


def summary(directory: Path, hash_seed: str, *words: str) -> dict:
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "executor=sim",
        "model=qwen3_0_6b",
        "tracking=none",
        f"hydra.run.dir={directory}",
        *words,
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((directory / "summary.json").read_text())


def test_the_command_line_gives_the_same_log_in_two_processes(tmp_path: Path) -> None:
    words = (
        "order=vtc",
        "cache=radix",
        "workload=multi_turn",
        "engine.num_blocks=600",
        "engine.max_num_seqs=8",
    )
    first, again, other = (
        summary(tmp_path / str(i), hash_seed, *words, f"seed={seed}")
        for i, (hash_seed, seed) in enumerate((("1", 0), ("2", 0), ("1", 1)))
    )
    assert first["decision_hash"] == again["decision_hash"] != other["decision_hash"]
    assert first["completed"] == first["num_requests"] > 0
    timed = {"policy_time", "policy_time_per_step_us"}
    assert {k: v for k, v in first.items() if k not in timed} == {
        k: v for k, v in again.items() if k not in timed
    }
