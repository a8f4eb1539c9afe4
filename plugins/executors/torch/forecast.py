"""When the device will have done what was launched: a plan made just before that knows of the most arrivals,
and costs no idle time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

EARLY = 0.001  # seconds that a plan is made before it is needed, beside what the host takes for it
DOUBT = 0.1  # part of a step's duration by which it may be shorter than the last one of its kind
FADING = 0.9  # what is left per turn of the host's longest: one slow turn is not remembered for ever

Kind = tuple[bool, int]  # a step of decodes?, and about how many tokens: steps of a kind take about as long


def kind_of(decode: bool, num_tokens: int) -> Kind:
    """The kind of a step, by the three leading bits of its number of tokens beside the first."""
    shift = max(0, num_tokens.bit_length() - 4)
    return decode, num_tokens >> shift << shift


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A step that was launched. at: when the launch was over."""

    kind: Kind
    at: float


class Forecast:
    """Steps in flight, and how long the last step of each kind took. Seconds on any one clock, which the
    caller reads."""

    def __init__(self) -> None:
        self._durations: dict[Kind, float] = {}
        self._flying: deque[Flight] = deque()
        self._free = 0.0  # when the last collected step ended
        self._longest_turn = 0.0  # of the host, of late: a plan and its launch
        self._turn_began: float | None = None

    def turn_begins(self, now: float) -> None:
        """The host begins to plan."""
        self._turn_began = now

    def launched(self, kind: Kind, began: float, now: float) -> Flight:
        """A step of that kind has been launched; `began`: when its launch did, which is all that is known of
        a turn that was not announced."""
        turn = now - (began if self._turn_began is None else self._turn_began)
        self._longest_turn, self._turn_began = max(FADING * self._longest_turn, turn), None
        flight = Flight(kind, now)
        self._flying.append(flight)
        return flight

    def collected(self, flight: Flight, now: float) -> None:
        """That step has ended. Steps launched before it that were not collected were given up."""
        while self._flying.popleft() is not flight:
            pass
        self._durations[flight.kind] = now - max(self._free, flight.at)
        self._free = now

    def next_plan(self) -> float:
        """When to plan the step behind those in flight. In the past where that cannot be told: nothing is in
        flight, or a step of a kind that was never seen."""
        if not self._flying or any(flight.kind not in self._durations for flight in self._flying):
            return self._free
        end = max(self._free, self._flying[0].at) + sum(
            (1 - DOUBT) * self._durations[f.kind] for f in self._flying
        )
        return end - EARLY - 1.5 * self._longest_turn
