"""The starvation check finds orders that favour one kind of request, whichever kind it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.starving_orders import RULES

from core.testing import kit, starve
from core.testing.subject import Subject

FILE = str(Path(__file__).parent / "helpers" / "starving_orders.py")


def verdict(*words: str) -> kit.Verdict:
    (found,) = kit.check_starvation(Subject(words, (FILE,)), ())
    return found


@pytest.mark.parametrize("rule", RULES)
def test_an_order_that_favours_one_kind_of_request_starves_another(rule: str, monkeypatch) -> None:
    monkeypatch.setattr(starve, "PATIENCE", 150)  # enough to see it
    found = verdict("order=by", f"order.rule={rule}", "order.at_most=64")
    assert found.failed and "has not started while" in found.detail, found


def test_an_order_that_favours_whom_it_served_most_is_found() -> None:
    assert verdict("order=most_served_client_first").failed


def test_what_is_fair_to_every_kind_passes_in_every_scene() -> None:
    for order in ("fcfs", "vtc", "hrrn", "mlfq"):
        found = verdict(f"order={order}")
        assert (found.verdict, found.runs) == (kit.PASS, len(starve.SCENES))


def test_every_scene_that_sets_one_request_apart_has_its_mirror() -> None:
    pairs = [
        (scene.odd, scene.others[0]) for scene in starve.SCENES if len(scene.others) == 1 and not scene.before
    ]
    apart = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(apart) == 18 and all((other, odd) in apart for odd, other in apart)


def test_a_stream_that_is_refused_comes_to_its_end() -> None:
    """Who is refused asks again later: asked at once, a limit of two requests for good would be asked without
    end."""
    found = verdict("admission=rpm", "admission.limit=2", "admission.window=1e9")
    assert (found.verdict, found.runs) == (kit.PASS, len(starve.SCENES))


def test_an_order_that_starves_in_many_scenes_is_told_after_a_few() -> None:
    found = verdict("order=by", "order.rule=newest_first")
    assert found.failed and found.detail.count("has not started") == kit.ENOUGH_SCENES
