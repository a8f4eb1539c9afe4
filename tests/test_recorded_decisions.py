"""Decisions stay as they are recorded: a sample. `tests/helpers/recorded_decisions.py` compares the whole
set."""

from __future__ import annotations

import pytest
from helpers.recorded_decisions import SIMULATED, TORCH, differences, recorded, rows

from core.blocks import BlockPool

EVERY = 23  # of the simulated rows; a prime, so that the sample meets every choice of every role


def sample() -> list[str]:
    return [row for row in rows() if row.startswith(SIMULATED)][::EVERY]


def test_the_record_has_every_row_and_no_other() -> None:
    assert sorted(recorded()) == sorted(rows())


def test_sampled_compositions_decide_as_recorded() -> None:
    assert differences(sample(), recorded()) == []


def test_the_real_engine_decides_as_recorded() -> None:
    assert differences([row for row in rows() if row.startswith(TORCH)], recorded()) == []


def test_another_decision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could not fail: here blocks are handed out in another order."""
    allocate = BlockPool.allocate
    monkeypatch.setattr(BlockPool, "allocate", lambda pool, count: allocate(pool, count)[::-1])
    assert differences(sample()[:3], recorded()) == sample()[:3]
