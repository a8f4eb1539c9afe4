"""Folders, locks and identities; what is stored of a config; what a half-written file is worth; what a signal
does when."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from omegaconf import OmegaConf

from core import interrupts as module
from core.cli.folders import Claims, InUse, Lock, Refused, Sweep, check_inputs, claim, identity, prepare
from core.cli.stored import hide, stored, watch_environment
from core.interrupts import Interrupts
from core.measure import results
from core.measure.results import (
    Unreadable,
    Unwritable,
    read_result,
    read_results,
    whole,
    write_json,
    write_text,
)


def job(sweep: Sweep, wanted: str, **config: object) -> str:
    """The name of the folder of a job, which is its own from then on."""
    cfg = OmegaConf.create(config)
    folder = sweep.job(wanted, identity(cfg))
    prepare(folder, cfg, [], identity(cfg))
    return folder.name


@pytest.fixture
def sweep(tmp_path) -> Iterator[Sweep]:
    held = Sweep(tmp_path / "sweep")
    yield held
    held.release()


# ---- whose folder it is ----------------------------------------------------------------------------------


def test_a_name_is_claimed_once_and_the_next_process_gets_the_next_name(tmp_path):
    assert [claim(tmp_path / "day" / "03-07-51").name for _ in range(3)] == [
        "03-07-51",
        "03-07-51-2",
        "03-07-51-3",
    ]


def test_a_command_claims_a_folder_once_and_gives_it_back_where_no_job_began(tmp_path):
    claims = Claims()
    claims.register()
    cfg = OmegaConf.create(
        {
            "dir": f"${{headway.folder:{tmp_path}/day/now}}",
            "used": f"${{headway.folder:{tmp_path}/other/now}}",
        }
    )
    assert cfg.dir == cfg.dir == str(tmp_path / "day" / "now")
    (tmp_path / "day" / "now" / "multirun.yaml").touch()
    (tmp_path / "other" / "now").mkdir(parents=True)
    assert cfg.used == str(tmp_path / "other" / "now-2")
    (tmp_path / "other" / "now-2" / "0").mkdir()
    claims.give_back_empty()
    assert not (tmp_path / "day").exists() and (tmp_path / "other" / "now-2" / "0").exists()


def test_a_lock_names_its_process_and_a_dead_process_holds_nothing(tmp_path):
    with (
        Lock(tmp_path),
        pytest.raises(InUse, match=f"process {os.getpid()} on .* writes into this folder now"),
    ):
        Lock(tmp_path)
    code = (
        "import os; from pathlib import Path; from core.cli.folders import Lock; "
        f"Lock(Path({str(tmp_path)!r})); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / ".headway.lock").exists()
    with Lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_known_by_its_config_and_not_by_its_number(sweep):
    assert [job(sweep, str(n), seed=seed) for n, seed in enumerate((1, 2))] == ["0", "1"]
    sweep.release()
    again = Sweep(sweep.folder)
    assert [job(again, str(n), seed=seed) for n, seed in enumerate((3, 2, 1, 4))] == ["2", "1", "0", "3"]


def test_a_folder_of_an_earlier_version_or_of_a_user_is_left_alone(sweep):
    for name in ("0", "1"):
        (sweep.folder / name).mkdir()
    write_json(sweep.folder / "0" / "result.json", GOOD)
    (sweep.folder / "1" / "notes.txt").write_text("mine")
    assert [job(sweep, "0", seed=1), job(sweep, "1", seed=2)] == ["1", "2"]
    assert (sweep.folder / "1" / "notes.txt").read_text() == "mine"


def test_a_name_that_a_user_chose_for_jobs_gets_a_suffix_for_the_second(sweep):
    assert [job(sweep, "mine", seed=seed) for seed in (1, 2, 1)] == ["mine", "mine-2", "mine"]


def test_a_job_does_not_remove_what_it_would_read(tmp_path):
    (tmp_path / "replay.npz").touch()
    for path in (tmp_path, tmp_path / "replay.npz"):
        with pytest.raises(Refused, match="own files would replace it"):
            check_inputs(tmp_path, OmegaConf.create({"executor": {"name": "replay", "path": str(path)}}))
    check_inputs(
        tmp_path / "other", OmegaConf.create({"executor": {"name": "replay", "path": str(tmp_path)}})
    )


def test_the_identity_is_of_the_resolved_config(monkeypatch):
    cfg = OmegaConf.create({"a": "${b}", "b": "${oc.env:PLANTED}"})
    monkeypatch.setenv("PLANTED", "one")
    one = identity(cfg)
    assert one == identity(OmegaConf.create({"b": "one", "a": "one"}))
    monkeypatch.setenv("PLANTED", "two")
    assert identity(cfg) != one


# ---- what is stored of a config --------------------------------------------------------------------------


def test_a_stored_config_keeps_what_depends_on_the_environment_and_resolves_the_rest(monkeypatch):
    watch_environment()
    monkeypatch.setenv("PLANTED", "sesame-4711")
    given = {
        "secret": "${oc.env:PLANTED}",
        "near": {"path": "/data/${oc.env:PLANTED}/x", "twice": "${.path}", "list": ["${secret}", "${plain}"]},
        "decoded": "${oc.decode:${oc.env:PLANTED}}",
        "default": "${oc.env:NOT_THERE,fallback}",
        "node": "${near}",
        "plain": 3,
        "same": "${plain}",
        "escaped": "\\${plain}",
        "none": None,
    }
    kept = stored(OmegaConf.create(given))
    assert kept == given | {"near": given["near"] | {"list": ["${secret}", 3]}, "same": 3}
    assert OmegaConf.to_container(OmegaConf.create(kept), resolve=True) == OmegaConf.to_container(
        OmegaConf.create(given), resolve=True
    )
    assert hide("cannot open /data/sesame-4711/x") == "cannot open /data/${oc.env:PLANTED}/x"


# ---- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_fails_half_way_leaves_the_old_one_whole(tmp_path, failure):
    write_text(tmp_path / "a.json", "old")
    with pytest.raises((Unwritable, KeyboardInterrupt)) as raised, whole(tmp_path / "a.json") as scratch:
        scratch.write_text("ne")
        raise failure
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]
    if isinstance(failure, OSError):
        assert str(raised.value) == f"{tmp_path / 'a.json'}: cannot be written: No space left on device"


GOOD = {"status": "finished", "error": "", "overrides": ["seed=1"], "summary": {"completed": 1}}
GARBLED = {
    "empty": b"",
    "cut": json.dumps(GOOD).encode()[:40],
    "bytes": b"\xff\xfe\x00\x01",
    "list": b"[]",
    "null": b"null",
    "text": b'"finished"',
    "another file": b"{}",
    "status": json.dumps(GOOD | {"status": "great"}).encode(),
    "deep": b"[" * 100_000,
    "overrides": json.dumps(GOOD | {"overrides": [1]}).encode(),
    "summary": json.dumps(GOOD | {"summary": None}).encode(),
}


@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED.keys())
def test_a_garbled_result_is_named_and_hides_no_other(tmp_path, content):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "result.json", GOOD)
    (tmp_path / "0" / "result.json").write_bytes(content)
    with pytest.raises(Unreadable, match=r"0/result\.json"):
        read_result(tmp_path / "0")
    found, problems = read_results(tmp_path)
    assert [r["directory"] for r in found] == [str(tmp_path / "1")] and len(problems) == 1


def test_a_garbled_summary_makes_a_result_doubtful_and_a_missing_one_does_not(tmp_path):
    write_json(tmp_path / "result.json", GOOD)
    assert read_result(tmp_path) == GOOD | {"directory": str(tmp_path)}
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(Unreadable, match=r"summary\.json"):
        read_result(tmp_path)


def test_room_is_kept_for_the_result_until_it_is_given_up(tmp_path):
    room = results.Room(tmp_path, size=4096)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == 4096
    room.give_up()
    assert list(tmp_path.iterdir()) == []


# ---- signals ---------------------------------------------------------------------------------------------


@pytest.fixture
def signals(monkeypatch) -> Iterator[Interrupts]:
    """The handlers of a run, for the time of a test."""
    names = (*module.SIGNALS, signal.SIGALRM)
    before = [signal.getsignal(name) for name in names]
    mine = Interrupts()
    mine.install()
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    yield mine
    mine.hold()
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)


def test_a_signal_before_the_first_step_is_raised_at_once_and_while_writing_by_nobody(signals):
    for name in (signal.SIGTERM, signal.SIGINT):  # the second hurries a clean-up that hangs
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(name)
    assert signals.exit_code == 143
    signals.hold()
    signal.raise_signal(signal.SIGHUP)
    assert signals.exit_code == 143
    with pytest.raises(KeyboardInterrupt):
        signals.release()


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(signals):
    done = []
    with pytest.raises(KeyboardInterrupt), signals.stepping():
        signal.raise_signal(signal.SIGINT)
        done.append("the step")
        signals.check()
        done.append("the next")
    assert done == ["the step"]
    signals.received = 0
    signals.release()
    with pytest.raises(KeyboardInterrupt), signals.stepping():
        signal.raise_signal(signal.SIGINT)
        done.append("the first")
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done[1:] == ["the first"]
    signal.raise_signal(signal.SIGINT)  # the run is over, and its results are written


def test_a_step_that_never_comes_back_is_interrupted_where_it_stands(signals):
    with pytest.raises(KeyboardInterrupt), signals.stepping():
        signal.raise_signal(signal.SIGTERM)
        signal.sigtimedwait([signal.SIGUSR1], 60)


def test_what_the_parent_ignores_stays_ignored(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    Interrupts().install()
    signal.raise_signal(signal.SIGHUP)
    assert not signals.received
