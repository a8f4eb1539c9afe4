"""`torchrun ... run.py`: a process for each rank, of which one runs, writes and prints; anything else is
refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.cli import torchrun
from core.errors import ConfigError
from headway import load_registry

ROOT = Path(__file__).parent.parent
RUN, SWEEP = "RunMode.RUN", "RunMode.MULTIRUN"


def started(monkeypatch, rank: int, of: int) -> None:
    told = {"RANK": rank, "WORLD_SIZE": of, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture
def composed(monkeypatch):
    """What `check` reads of a composed config."""

    def compose(executor: str = "torch", tp: int = 1, pp: int = 1):
        from headway import ParallelConfig

        choices = {"executor": (executor, {})}
        composition = type("Composition", (), {"choices": choices, "parallel": ParallelConfig(tp=tp, pp=pp)})
        monkeypatch.setattr(torchrun.schema, "composition", lambda cfg: composition)
        return OmegaConf.create()

    return compose


@pytest.mark.parametrize(
    ("executor", "tp", "pp", "mode", "message"),
    [
        (
            "torch",
            1,
            1,
            RUN,
            "started 4 processes, and parallel.tp=1 parallel.pp=1 needs 1: set parallel.tp=4",
        ),
        ("torch", 2, 1, RUN, "parallel.tp=2 parallel.pp=1 needs 2: set parallel.tp=4"),
        ("torch", 4, 4, RUN, "needs 16"),
        ("sim", 4, 1, RUN, "started 4 processes, and executor=sim runs in one: start it without torchrun"),
        ("sim", 1, 1, RUN, "executor=sim runs in one"),
        ("oracle", 1, 1, RUN, "executor=oracle runs in one"),
        ("torch", 4, 1, SWEEP, "a sweep is several: start each with its own torchrun"),
    ],
)
def test_what_every_process_would_do_alone_is_refused(request, executor, tp, pp, mode, message):
    names = ("monkeypatch", "capsys", "registry", "composed")
    monkeypatch, capsys, registry, composed = map(request.getfixturevalue, names)
    started(monkeypatch, rank=0, of=4)
    with pytest.raises(ConfigError, match=message):
        torchrun.check(composed(executor, tp, pp), mode, registry)
    started(monkeypatch, rank=3, of=4)
    with pytest.raises(SystemExit) as ended:  # and said by one of them
        torchrun.check(composed(executor, tp, pp), mode, registry)
    assert (ended.value.code, capsys.readouterr()) == (2, ("", ""))


@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (2, 2), (1, 4)])
def test_a_process_for_each_rank_is_what_torchrun_is_for(monkeypatch, registry, composed, tp, pp):
    started(monkeypatch, rank=0, of=4)
    torchrun.check(composed("torch", tp, pp), RUN, registry)


def test_one_process_and_no_torchrun_are_as_ever(monkeypatch, registry, composed):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    torchrun.check(composed("sim"), SWEEP, registry)
    started(monkeypatch, rank=0, of=1)
    torchrun.check(composed("sim"), SWEEP, registry)
    assert torchrun.overrides() == [] and not torchrun.serves()


def test_nothing_is_written_where_torchrun_is_refused(tmp_path):
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT)}
    folders = [tmp_path / f"rank{rank}" for rank in range(2)]
    command = [sys.executable, "run.py", "executor=sim", "model=qwen3_8b", "tracking=none"]
    runs = [
        subprocess.Popen(
            [*command, f"hydra.run.dir={folder}"],
            cwd=ROOT,
            env=os.environ | told | {"RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, folder in enumerate(folders)
    ]
    printed = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [2, 2], printed
    assert (
        "error: torchrun started 2 processes, and executor=sim runs in one" in printed[0] and printed[1] == ""
    )
    # Hydra's own
    assert not folders[1].exists() and not [
        file.name for file in folders[0].glob("*") if file.name != ".hydra"
    ]
