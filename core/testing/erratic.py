"""Legal but erratic policies: they fill the roles that a user did not name, so that the named ones meet every
situation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..blocks import Block
from ..compose.hooks import Registry
from ..context import Context
from ..policy import (
    Admission,
    Admit,
    ChunkSize,
    Defer,
    Eviction,
    KVControl,
    LengthPrediction,
    Need,
    Order,
    Predictor,
    Retention,
    Scheduler,
    Victim,
)
from ..request import Request, RequestState
from ..step import StepBuilder
from ..view import View


@dataclass
class ErraticScheduler(Scheduler):
    """Plans in random order, in random chunks; preempts and idles now and then."""

    def plan(self, step: StepBuilder, view: View) -> None:
        rng = self.rng
        if not view.lag and rng.random() < 0.03:
            step.wake_at(view.now + 0.01)
            return
        step.limit(seqs=rng.choice([1, 2, 99]))
        running = list(view.running)
        rng.shuffle(running)
        for request in running:
            if request.state is not RequestState.RUNNING or request in step:
                continue  # it was preempted to make room
            leaves = rng.random() if len(running) > 1 else 1.0
            if leaves < 0.03:
                step.preempt(request, rng.choice(("recompute", "drop_tail")))
            elif leaves < 0.15:
                step.pause(request)
            else:
                step.add(request, rng.choice([None, None, 1, 3]))
        for request in self.order(view):
            if request.state is RequestState.WAITING or not any(r is request for r in running):
                step.add(request, rng.choice([None, 2]))


@dataclass
class ErraticOrder(Order):
    """A new random order every step."""

    def order(self, view: View) -> Sequence[Request]:
        return self.rng.sample(view.waiting, len(view.waiting))


@dataclass
class ErraticVictim(Victim):
    """Random victims, the needy request itself among them."""

    mode: str = "recompute"

    def victims(self, need: Need, view: View) -> Iterable[Request]:
        return self.rng.sample(view.running, self.rng.randint(1, len(view.running)))

    def paused(self, need: Need, view: View) -> Iterable[Request]:
        return self.rng.sample(view.paused, self.rng.randint(0, len(view.paused)))


@dataclass
class ErraticChunkSize(ChunkSize):
    """A random share of what is left."""

    def tokens(self, request: Request, left: int, view: View) -> int:
        return self.rng.randint(1, left)


@dataclass
class ErraticAdmission(Admission):
    """Defers now and then."""

    def admit(self, request: Request, view: View) -> Admit | Defer:
        return Defer(view.now + 0.02) if self.rng.random() < 0.2 else Admit()


@dataclass
class ErraticPredictor(Predictor):
    """Any length at all."""

    def predict(self, request: Request) -> LengthPrediction:
        mean = self.rng.uniform(1, 12)
        return LengthPrediction(mean, 2 * mean)


@dataclass
class Declared(Predictor):
    """Every answer is as long as its max_tokens allows."""

    def predict(self, request: Request) -> LengthPrediction:
        longest = float(request.sampling.max_tokens or 16)
        return LengthPrediction(longest, longest)


@dataclass
class ErraticEviction(Eviction):
    """A random evictable block."""

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._blocks: dict[int, Block] = {}

    def on_evictable(self, block: Block) -> None:
        self._blocks[block.id] = block

    def on_in_use(self, block: Block) -> None:
        del self._blocks[block.id]

    def candidates(self, n: int) -> Iterator[Block]:
        while self._blocks:
            yield self._blocks.pop(self.rng.choice(list(self._blocks)))


@dataclass
class ErraticRetention(Retention):
    """Pins, unpins and drops by chance."""

    def retain(self, request: Request, kv: KVControl, now: float) -> None:
        chance = self.rng.random()
        if chance < 0.4:
            kv.pin(request, now + self.rng.choice([0.01, 0.1, 10.0]))
        elif chance < 0.5:
            kv.drop(request)
        elif chance < 0.6:
            kv.unpin(request.tags.session)


ERRATIC = (
    ErraticScheduler,
    ErraticOrder,
    ErraticVictim,
    ErraticChunkSize,
    ErraticAdmission,
    ErraticPredictor,
    ErraticEviction,
    ErraticRetention,
)


def add_to(registry: Registry) -> None:
    """Makes each choosable as `role=erratic` (and `predictor=declared`), in the kit's own registry alone."""
    for factory in ERRATIC:
        registry.add(factory.role, "erratic", factory)
    registry.add("predictor", "declared", Declared)
