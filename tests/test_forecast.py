"""A plan behind a running step is made shortly before that step ends, and never so late that the device
waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.executors.torch.forecast import DOUBT, EARLY, Forecast, kind_of

DECODES, PROMPTS = kind_of(True, 64), kind_of(False, 600)


def measured(forecast: Forecast, kind, seconds: float, now: float) -> float:
    """A step of that kind launched at `now` and collected when it ended, which is answered."""
    flight = forecast.launched(kind, now, now)
    forecast.collected(flight, now + seconds)
    return now + seconds


def test_steps_of_a_kind_differ_by_an_eighth_in_tokens():
    assert kind_of(False, 600) == kind_of(False, 639) != kind_of(False, 640)
    assert kind_of(False, 600) != kind_of(True, 600)
    assert [kind_of(True, n)[1] for n in range(1, 16)] == list(range(1, 16))


@given(st.floats(0.002, 1), st.floats(0, 0.001))
def test_the_next_plan_is_made_before_the_step_can_end(seconds, turn):
    forecast = Forecast()
    now = measured(forecast, DECODES, seconds, 5.0)
    forecast.turn_begins(now)
    forecast.launched(DECODES, now + turn / 2, now + turn)
    planned = forecast.next_plan()
    # though it is a tenth shorter this time
    assert planned + turn + EARLY <= now + turn + (1 - DOUBT) * seconds + 1e-9
    # and no earlier than it needs to be
    assert planned >= now + (1 - DOUBT) * seconds - EARLY - 1.5 * turn - 1e-9


def test_what_was_never_seen_is_not_waited_for():
    forecast = Forecast()
    assert forecast.next_plan() <= 0.0
    now = measured(forecast, DECODES, 0.5, 0.0)
    forecast.launched(PROMPTS, now, now)
    assert forecast.next_plan() <= now


def test_steps_in_flight_are_worked_off_one_after_the_other():
    forecast = Forecast()
    now = measured(forecast, PROMPTS, 0.2, measured(forecast, DECODES, 0.1, 0.0))
    for kind in (DECODES, PROMPTS):
        forecast.launched(kind, now, now)
    assert forecast.next_plan() == pytest.approx(now + (1 - DOUBT) * 0.3 - EARLY)


def test_a_slow_turn_is_allowed_for_and_forgotten():
    forecast = Forecast()
    now = measured(forecast, DECODES, 0.1, 0.0)
    usual = forecast.next_plan
    forecast.turn_begins(now)
    slow = forecast.launched(DECODES, now + 0.01, now + 0.02)
    assert usual() == pytest.approx(now + 0.02 + (1 - DOUBT) * 0.1 - EARLY - 1.5 * 0.02)
    forecast.collected(slow, now := now + 0.12)
    for _ in range(80):
        now = measured(forecast, DECODES, 0.1, now)
    forecast.launched(DECODES, now, now)
    assert usual() == pytest.approx(now + (1 - DOUBT) * 0.1 - EARLY, abs=1e-5)


def test_flights_that_were_given_up_are_not_waited_for():
    forecast = Forecast()
    now = measured(forecast, DECODES, 0.1, 0.0)
    forecast.launched(DECODES, now, now)
    forecast.collected(forecast.launched(DECODES, now, now), now := now + 0.1)
    forecast.launched(DECODES, now, now)
    assert forecast.next_plan() == pytest.approx(now + (1 - DOUBT) * 0.1 - EARLY)
