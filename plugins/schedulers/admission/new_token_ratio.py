"""Admission by a share of max_tokens that is learned."""

from __future__ import annotations

from dataclasses import dataclass

from headway import Admission, Admit, Context, Defer, Registry, Request, StepRecord, View, hookimpl, param


@dataclass
class NewTokenRatio(Admission):
    """SGLang's admission (managers/schedule_policy.py): who runs is thought to use a share of its max_tokens,
    which decays until memory runs out.

    A request starts if its prompt and all of its max_tokens fit beside what runs, of whose remaining
    max_tokens `ratio` counts. The ratio begins at init, falls in `decay_steps` decode steps to init *
    min_factor, and after a preemption is what those that still run have used, and `retract_steps` tokens
    each, of their max_tokens. clip: more than so many tokens are never counted for one request.

    The defaults are SGLang's. A prompt that is split counts by its chunks. Preempted requests are asked for
    again.
    """

    init: float = param(0.7, above=0, max=1)
    min_factor: float = param(0.14, min=0, max=1)
    decay_steps: int = param(600, min=1, max=2**31 - 1)
    retract_steps: int = param(20, min=0, max=2**31 - 1)
    clip: int = param(4096, min=1, max=2**31 - 1, unit="tokens")
    readmits = True

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._size, self._max_model_len = ctx.block_size, ctx.max_model_len
        self.ratio, self._least = self.init, self.init * self.min_factor
        self._running: dict[int, Request] = {}
        self._new = -1  # index of the request that is arriving
        self._moment: tuple[int, float, int] = (-1, 0.0, 0)  # step, now and lag for which the next one holds
        self._taken = 0.0  # tokens that those which run are thought to need still
        self._retracted = False

    def max_new_tokens(self, request: Request) -> int:
        """Tokens that it may still generate, clipped."""
        cap, most = request.sampling.max_tokens, self._max_model_len - request.num_prompt_tokens
        left = (most if cap is None else min(most, cap)) - request.num_output_tokens
        return min(max(0, left), self.clip)

    def admit(self, request: Request, view: View) -> Admit | Defer:
        if request.index == self._new:
            self._new = -1
            return Admit()  # it is asked again when it is its turn
        if (moment := (view.step, view.now, view.lag)) != self._moment:
            self._moment = moment
            self._taken = self.ratio * sum(map(self.max_new_tokens, self._running.values()))
        if not self._running:
            return Admit()  # alone it fits, or the engine would have refused it
        own = request.num_tokens - view.match(request).num_tokens + self.max_new_tokens(request)
        return Admit() if own < view.kv.available * self._size - self._taken else Defer()

    def on_arrival(self, request: Request, now: float) -> None:
        self._new = request.index

    def on_admit(self, request: Request, now: float) -> None:
        self._running[request.index] = request
        self._taken += self.max_new_tokens(request)  # in full until the next step

    def on_preempt(self, request: Request, now: float) -> None:
        self._running.pop(request.index, None)
        self._retracted = True

    def on_finish(self, request: Request, now: float) -> None:
        self._running.pop(request.index, None)

    def on_step_end(self, record: StepRecord) -> None:
        if self._retracted:
            self._retracted = False
            self.ratio = self._used()
        elif record.plan.num_tokens == len(record.plan.requests):  # decodes alone
            self.ratio = max(self._least, self.ratio - (self.init - self._least) / self.decay_steps)

    def _used(self) -> float:
        """Share of their max_tokens that those which run have used, and will have in some steps."""
        running = self._running.values()
        used = sum(request.num_output_tokens + self.retract_steps for request in running)
        allowed = sum(request.num_output_tokens + self.max_new_tokens(request) for request in running)
        return min(1.0, used / allowed) if allowed else 1.0


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("admission", "new_token_ratio", NewTokenRatio)
