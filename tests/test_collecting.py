"""While an engine runs, garbage is collected rarely; however the run ends, the collector is as it was
before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
from helpers.scripted import ask, engine, everybody

from core.collecting import YOUNG, rare_collections

USUAL = (700, 10, 10)


@pytest.fixture(autouse=True)
def usual_collector() -> Iterator[None]:
    before, on = gc.get_threshold(), gc.isenabled()
    gc.enable()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)
    if not on:
        gc.disable()


def thresholds_of_a_run(act: Callable[[], object] = lambda: None) -> list[tuple[int, int, int]]:
    """What each step of a run sees, after it did `act`."""
    seen = []

    def script(step, view) -> None:
        act()
        seen.append(gc.get_threshold())
        everybody(step, view)

    engine(script).run([ask(answer=3)])
    return seen


def test_collections_are_rarer_during_a_run_and_as_before_afterwards() -> None:
    assert set(thresholds_of_a_run()) == {(YOUNG, 10, 10)}
    assert gc.get_threshold() == USUAL


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_a_run_that_is_cut_off_restores_the_collector(ending: type[BaseException]) -> None:
    def end(step, view) -> None:
        raise ending

    try:
        engine(end).run([ask()])
    except Exception as error:
        assert ending is not KeyboardInterrupt, error
    assert gc.get_threshold() == USUAL


def test_a_run_inside_a_run_leaves_the_outer_one_its_thresholds() -> None:
    assert set(thresholds_of_a_run(thresholds_of_a_run)) == {(YOUNG, 10, 10)}
    assert gc.get_threshold() == USUAL


def test_runs_that_overlap_restore_it_when_the_last_one_ends() -> None:
    first, second = rare_collections(), rare_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() == (YOUNG, 10, 10)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == USUAL


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    assert set(thresholds_of_a_run()) == {USUAL}
    assert not gc.isenabled()


@pytest.mark.parametrize("given", [(0, 10, 10), (YOUNG, 5, 5), (10 * YOUNG, 10, 10)])
def test_a_caller_s_own_thresholds_that_are_as_rare_are_left_alone(given: tuple[int, int, int]) -> None:
    gc.set_threshold(*given)
    assert set(thresholds_of_a_run()) == {given}
    assert gc.get_threshold() == given


def test_thresholds_that_a_policy_sets_in_a_run_stay() -> None:
    thresholds_of_a_run(lambda: gc.set_threshold(123, 4, 5))
    assert gc.get_threshold() == (123, 4, 5)


def test_cycles_that_a_policy_makes_are_still_collected_within_a_run() -> None:
    class Knot:
        def __init__(self) -> None:
            self.itself = self

    alive: weakref.WeakSet[Knot] = weakref.WeakSet()
    most = 0

    def tie() -> None:
        nonlocal most
        for _ in range(YOUNG):
            alive.add(Knot())
        most = max(most, len(alive))

    steps = len(thresholds_of_a_run(tie))
    assert most < min(steps, 3) * YOUNG
