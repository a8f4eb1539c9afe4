"""`executor=sim executor.like=RUN`: the limits of a recorded run, so that it and its simulation differ in
time alone.

What decides something and belongs to the executor or the engine is taken from the record: KV blocks, their
size, sequences, tokens and plans in flight, the context, the token budget, the ids that end a sequence. What
cannot be taken and must not differ (the model's shape, the ranks) is an error. What may differ on purpose
(policies, workload, seed, targets) is said.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from headway import BuildContext, ConfigError, EngineConfig, ExecutorCaps, fact_differences

from .record import LIMITS, Record

BUDGET = "scheduler.token_budget"
#: Facts that are about time, or about nothing that is decided.
TIME = ("executor", "kernels", "hardware", "tracking", "engine.check", "model.", "parallel.")


@dataclass(frozen=True)
class Likeness:
    """A recorded run, as far as a simulation is to be like it."""

    record: Record

    @classmethod
    def read(cls, path: str) -> Likeness:
        """Raises ReplayError for what is no record of this version, ConfigError for a run that was composed
        by hand."""
        record = Record.load(path, "executor.like")
        if record.meta["facts"] is None:
            made = "does not hold its run's composition"
            raise ConfigError(f"executor.like={path}: {made}: record one with run.py")
        return cls(record)

    @property
    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.record.meta["facts"]
        return facts

    @property
    def _named(self) -> str:
        return f"executor.like={self.record.path.parent}"

    def check(self, context: BuildContext) -> None:
        """Raises ConfigError where the recorded run is of another model or on other ranks."""
        kept, shape = self.record.meta["model"], asdict(context.shape)
        if kept is None:
            raise ConfigError(f"{self._named}: does not say the shape of its model")
        layout = {"parallel.tp": context.parallel.tp, "parallel.pp": context.parallel.pp}
        here = {f"model.{name}": value for name, value in shape.items()} | layout
        then = {f"model.{name}": value for name, value in kept.items()}
        then |= {name: self._facts[name] for name in layout}
        if differing := fact_differences(then, here):
            lines = "".join(f"\n  {line}" for line in differing)
            raise ConfigError(f"{self._named}: is of another model or on other ranks:{lines}")

    def limits(self, given: EngineConfig) -> EngineConfig:
        """The recorded ones. Raises ConfigError for one that is given as something else; a default counts as
        not given."""
        defaults, recorded = EngineConfig(), self.record.meta["limits"]
        for name in LIMITS:
            own = getattr(given, name)
            if own not in (getattr(defaults, name), recorded[name]):
                then = f"{self._named} ran with {recorded[name]}"
                raise ConfigError(f"engine.{name}={own}, but {then}: leave it out, or set it to that")
        return replace(given, **recorded)

    def caps(self, own: ExecutorCaps) -> ExecutorCaps:
        """What the recorded executor said of itself. Raises ConfigError for what a simulation cannot do."""
        said = self.record.meta["caps"]
        if said["tokens_per_step"] > 1 or said["tier_blocks"]:
            beyond = "gave several tokens per step, or had tiers of KV"
            raise ConfigError(f"{self._named}: {beyond}: the simulator does neither")
        own_names = {f.name for f in fields(ExecutorCaps)} - {"vocab_size", "tier_blocks", "model"}
        taken = {name: said[name] for name in own_names if name in said}
        taken["eos_token_ids"] = frozenset(said["eos_token_ids"])
        taken["max_inflight"] = max(said["max_inflight"], self.record.meta["limits"]["max_inflight"])
        return replace(own, **taken | {"default_token_budget": self.token_budget})

    @property
    def token_budget(self) -> int:
        """Of the recorded scheduler, whether it was given or derived; of one without a budget, what suits the
        executor."""
        derived, suits = self.record.meta["derived"], self.record.meta["caps"]["default_token_budget"]
        budget: int = derived.get(BUDGET) or self._facts.get(BUDGET) or suits
        return budget

    def told(self, facts: dict[str, Any]) -> str:
        """What is taken and what differs, for the reader of the run's output."""
        limits = " ".join(f"{name}={value}" for name, value in self.record.meta["limits"].items())
        lines = [f"limits of {self.record.path.parent}: {limits} token_budget={self.token_budget}"]
        if self.record.meta["caps"]["eos_token_ids"]:
            lines.append("  answers end where the workload says: the simulator samples no end of sequence")
        then, now = _chosen(self._facts), _chosen(facts)
        if None in (then.get(BUDGET), now.get(BUDGET)):  # left open on one side: taken from there
            then.pop(BUDGET, None)
            now.pop(BUDGET, None)
        lines += [f"  differs: {line}" for line in fact_differences(then, now)]
        return "\n".join(lines)


def _chosen(facts: dict[str, Any]) -> dict[str, Any]:
    """Those that decide something and are no limit of the engine."""
    return {name: value for name, value in facts.items() if not name.startswith((*TIME, "engine."))}
