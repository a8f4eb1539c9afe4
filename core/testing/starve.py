"""The starvation monitor: one request that differs from an endless stream of others must end while they keep
coming."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..compose.config import EngineConfig
from ..engine import Engine
from ..inputs import SLO, Arrival, SamplingParams, Tags
from ..policy import Role
from ..request import Request, RequestState
from .oracle import OracleExecutor

BACKLOG = 12  # requests in the system at any time; four of them run at once
PATIENCE = 1000  # later arrivals that may end before the odd one does
# seconds until who was refused asks again: at once, a policy that refuses would be asked without end
RETRY = 1.0
TIGHT = SLO(0.5, 0.05, 1.0)
SHARED = [1, 2, 3, 4, 1, 2, 3, 4]


@dataclass(frozen=True)
class Scene:
    """What sets the odd request apart from the stream."""

    name: str
    odd: Arrival
    others: tuple[Arrival, ...]  # the stream: one after another, again and again
    before: int = 0  # requests like the odd one that are served before the stream begins
    backlog: int = BACKLOG  # requests in the system when the odd one comes, and from then on


def _arrival(
    prompt: int = 10,
    answer: int = 4,
    *,
    client: str = "a",
    session: str = "",
    turn: int = 0,
    priority: int = 0,
    category: str = "",
    slo: SLO = TIGHT,
    shared: bool = True,
) -> Arrival:
    tokens = (SHARED if shared else [0] * len(SHARED)) + [2] * (prompt - len(SHARED))
    return Arrival(
        time=0.0,
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=answer),
        output_len=None,
        id=None,
        tags=Tags(client, session, turn, category, priority=priority),
        slo=slo,
    )


_USUAL, _OLD, _CHAT = _arrival(), _arrival(session="old", turn=3), _arrival(category="chat")


def _both_ways(name: str, one: Arrival, mirrored: str, other: Arrival = _USUAL) -> tuple[Scene, Scene]:
    """One among the others' kind, and one of the others' kind among its own: a policy may favour either."""
    return Scene(name, one, (other,)), Scene(mirrored, other, (one,))


def _clients(names: str) -> tuple[Arrival, ...]:
    return tuple(_arrival(client=name) for name in names)


SCENES = (
    Scene("nothing that sets it apart", _USUAL, (_USUAL,)),
    Scene("a late arrival behind a long queue", _USUAL, (_USUAL,), backlog=40),
    *_both_ways("another client", _arrival(client="b"), "another client, of the lesser name"),
    Scene("a client that was served a lot before", _arrival(client="b", session="b"), (_USUAL,), before=40),
    Scene("a client among many small ones", _arrival(client="d"), _clients("abcefg")),
    Scene(
        "a client that was served a lot before, among many",
        _arrival(client="d"),
        _clients("abcefg"),
        before=40,
    ),
    Scene(
        "a client among one that asks a lot and one that does not", _arrival(client="b"), _clients("aaaaac")
    ),
    *_both_ways("a long prompt", _arrival(prompt=40), "a short prompt among long ones"),
    Scene("a prompt between shorter and longer ones", _arrival(prompt=24), (_USUAL, _arrival(prompt=40))),
    *_both_ways("a long answer", _arrival(answer=24), "a short answer among long ones"),
    Scene("an answer between shorter and longer ones", _arrival(answer=12), (_USUAL, _arrival(answer=24))),
    *_both_ways("no shared prefix", _arrival(shared=False), "another prefix than the rest"),
    *_both_ways("the lowest priority", _arrival(priority=9), "the highest priority among low ones"),
    *_both_ways("a far deadline", _arrival(slo=SLO(5.0, 0.5, 10.0)), "a near deadline among far ones"),
    *_both_ways("no deadline", _arrival(slo=SLO()), "a deadline among requests without"),
    *_both_ways(
        "a new session among old ones", _arrival(session="new"), "an old session among new ones", _OLD
    ),
    *_both_ways(
        "another category", _arrival(category="batch"), "another category, of the greater name", _CHAT
    ),
)


@dataclass(frozen=True)
class Starved:
    scene: str
    waited: int  # later arrivals that had ended
    seconds: float
    started: bool

    def __str__(self) -> str:
        state = "has started and does not end" if self.started else "has not started"
        return (
            f"a request with {self.scene} {state} while {self.waited} later ones ended ({self.seconds:.0f} s "
            "on the run's clock)"
        )


def starved(scene: Scene, roles: dict[str, Role]) -> Starved | None:
    """None when the odd request ended in time (or was refused)."""
    executor = OracleExecutor(num_blocks=48, step_seconds=0.05)
    engine = Engine({**roles, "executor": executor}, EngineConfig(4, 48, 4, 32), seed=0)
    made = 0

    def more(count: int, kinds: tuple[Arrival, ...], now: float) -> Iterable[Arrival]:
        nonlocal made
        for _ in range(count):
            like = kinds[made % len(kinds)]
            made += 1
            prompt = [*like.prompt_token_ids[:-1], made % 5]
            yield replace(like, time=now, id=f"n{made}", prompt_token_ids=prompt)

    ended = {"odd": False}
    others = 0

    def follow(request: Request, now: float) -> Iterable[Arrival]:
        nonlocal others
        if request.id == "odd":
            ended["odd"] = True
            return ()
        if request.state is RequestState.REJECTED:
            now += RETRY
        if len(engine.roster.finished) < scene.before:
            return more(1, (scene.odd,), now)
        if request.arrival_time >= start:
            others += request.state is RequestState.FINISHED
        return more(1, scene.others, now) if others < PATIENCE and not ended["odd"] else ()

    start = float("inf")
    engine.arrivals.on_result = follow
    for arrival in more(scene.backlog, (scene.odd,) if scene.before else scene.others, 0.0):
        engine.add(arrival)
    while len(engine.roster.finished) < max(scene.before, scene.backlog) and engine.step():
        pass
    start = engine.clock.inner.now()
    engine.add(replace(scene.odd, time=start, id="odd"))
    for arrival in more(4, scene.others, start):
        engine.add(arrival)
    while not ended["odd"] and others < PATIENCE and engine.step():
        pass
    if ended["odd"]:
        return None
    odd = next((r for r in (*engine.running.items, *engine.waiting.items) if r.id == "odd"), None)
    return Starved(
        scene.name,
        others,
        engine.clock.inner.now() - start,
        odd is not None and bool(odd.first_scheduled_time >= 0),
    )
