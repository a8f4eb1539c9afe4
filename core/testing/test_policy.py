"""The conformance kit as tests: one a part of `python -m headway check`."""

from __future__ import annotations

from typing import Any

import pytest

from core.testing.check import explain
from core.testing.kit import CHECKS
from core.testing.subject import Subject


@pytest.fixture(scope="module")
def subject(request: Any) -> Subject:
    config = request.config
    subject = Subject(tuple(config.getoption("--policy").split()), tuple(config.getoption("--policy-module")))
    subject.refuse_what_cannot_be()
    return subject


@pytest.mark.parametrize("part", CHECKS)
def test_policy(part: str, subject: Subject, request: Any) -> None:
    seeds = range(request.config.getoption("--policy-seeds"))
    failed = [explain(v) for v in CHECKS[part](subject, seeds) if v.failed]
    assert not failed, "\n\n".join(failed)
