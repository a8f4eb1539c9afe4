"""Benchmarks on several GPUs: a card runs one job at a time, and results come in the order of the jobs."""

from __future__ import annotations

from threading import Barrier, Lock

import pytest

from experiments.cards import on_cards


@pytest.mark.parametrize("gpus", ["0", "", "0,1", "3,5,6"])
def test_no_two_jobs_share_a_card(gpus: str) -> None:
    at_once = len(gpus.split(","))
    together, lock, busy, used = Barrier(at_once), Lock(), set(), []

    def job(gpu: str) -> str:
        with lock:
            assert gpu not in busy
            busy.add(gpu)
            used.append(gpu)
        together.wait(timeout=10)  # all cards are at work
        with lock:
            busy.remove(gpu)
        return gpu

    jobs = {f"job {i}": job for i in range(2 * at_once)}
    assert list(dict(on_cards(jobs, gpus))) == list(jobs)
    assert set(used) == set(gpus.split(","))


def test_a_job_that_fails_says_so_and_its_card_is_free_for_the_next() -> None:
    jobs = {"bad": lambda gpu: 1 / 0, "good": lambda gpu: gpu}
    results = on_cards(jobs, "0")
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert dict(on_cards({"good": jobs["good"]}, "0")) == {"good": "0"}
