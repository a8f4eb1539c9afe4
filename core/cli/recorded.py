"""What `headway whatif` asks of a run: one of ours, by its directory, or one that a benchmark's clients
recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..errors import HeadwayError
from ..measure import results
from ..measure.doubt import within
from ..measure.served import Served, read_served, seen, served_steps
from ..outputs import RunResult
from ..renamed import with_names_of_today
from . import schema
from .stored import stored

#: What a simulation chooses for itself, and what keeps nothing. Everything else of the recorded run is as it
#: was.
OWN = ("executor", "kernels", "tracking", "results", "hydra", "model.load_format")


@dataclass(frozen=True)
class Recorded:
    """What whatif asks of a run's directory."""

    directory: Path
    overrides: list[str]
    summary: dict[str, Any]
    config: dict[str, Any]
    requests: dict[str, tuple[int, int]]  # id -> tokens of prompt and answer
    largest: tuple[int, int]  # most tokens and requests of one of its steps

    @classmethod
    def read(cls, directory: Path) -> Recorded:
        """Raises HeadwayError for what is no finished run with its tables."""
        result = results.read_result(directory) if directory.is_dir() else None
        if result is None:
            raise HeadwayError(f"{directory}: is no run's directory: expected one with {results.RESULT}")
        if result["status"] != "finished":
            raise HeadwayError(f"{directory}: its run {result['status']}: expected one that finished")
        requests = _columns(directory / "requests.parquet", "id", "num_prompt_tokens", "num_output_tokens")
        steps = _columns(directory / "steps.parquet", "num_tokens", "num_seqs")
        config: Any = OmegaConf.to_container(OmegaConf.load(directory / results.CONFIG), resolve=False)
        return cls(
            directory=directory,
            overrides=result["overrides"],
            summary=result["summary"],
            config=with_names_of_today(config),
            requests={id: (prompt, answer) for id, prompt, answer in zip(*requests, strict=True)},
            largest=(max(steps[0], default=0), max(steps[1], default=0)),
        )

    @property
    def words(self) -> list[str]:
        """Its overrides, without what a simulation chooses itself."""
        return [word for word in self.overrides if not within(word, OWN)]

    def largest_step(self, cfg: DictConfig) -> tuple[int, int]:
        return self.largest

    def own(self) -> list[str]:
        """What a simulation of it has beside its words: its limits and its clock."""
        there = json.dumps(str(self.directory))
        return [f"executor.like={there}", f"executor.profile={there}"]

    def check_composition(self, cfg: DictConfig) -> None:
        """Raises HeadwayError where its overrides compose another run today: defaults or presets have changed
        since."""
        now = _flat({name: node for name, node in stored(cfg).items() if name not in OWN})
        then = _flat({name: node for name, node in self.config.items() if name not in OWN})
        skipped = ("engine.check", "model.load_format")
        differing = [name for name in sorted({*now, *then} - {*skipped}) if now.get(name) != then.get(name)]
        if differing:
            lines = "".join(
                f"\n  {name}={now.get(name)}, recorded with {then.get(name)}" for name in differing
            )
            raise HeadwayError(
                f"{self.directory}: its overrides compose another run today:{lines}\nrecord it again"
            )

    def check_requests(self, result: RunResult) -> str:
        """What a reader should know of the requests. Raises HeadwayError where the workload gives others than
        were recorded."""
        now = {output.id: (output.num_prompt_tokens, len(output.token_times)) for output in result.outputs}
        others = sorted(
            id for id in {*now, *self.requests} if now.get(id, (-1,))[0] != self.requests.get(id, (-2,))[0]
        )
        if others:
            how = f"{len(others)} of {len(self.requests)}, {others[0]!r} among them, are others or missing"
            raise HeadwayError(f"{self.directory}: its workload gives other requests today: {how}")
        longer = sum(now[id][1] != answer for id, (_, answer) in self.requests.items())
        cause = "another length than recorded: the model ended them, the simulator goes by the workload"
        return f"{longer} of {len(now)} answers have {cause}" if longer else ""


@dataclass(frozen=True)
class OfClients:
    """What whatif asks of the file of `vllm bench serve`: the same as of a run's directory."""

    directory: Path  # the file
    overrides: list[str]  # how its server was composed, in our words
    answered: list[Served]

    @classmethod
    def read(cls, file: Path, server: Sequence[str]) -> OfClients:
        return cls(directory=file, overrides=list(server), answered=read_served(file, "whatif"))

    @property
    def words(self) -> list[str]:
        there = json.dumps(str(self.directory))
        load = ["workload=trace", f"workload.path={there}", "workload.format=vllm_bench"]
        return [*(word for word in self.overrides if not within(word, (*OWN, "workload"))), *load]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(seen(self.answered))

    def largest_step(self, cfg: DictConfig) -> tuple[int, int]:
        budget = schema.composition(cfg).engine.max_num_batched_tokens
        lengths = [lengths for _, lengths, _ in served_steps(self.answered, budget)]
        return max(map(sum, lengths), default=0), max(map(len, lengths), default=0)

    def own(self) -> list[str]:
        return [f"executor.profile={json.dumps(str(self.directory))}"]

    def check_composition(self, cfg: DictConfig) -> None:
        """Nobody but the user can say whether it is the server's."""

    def check_requests(self, result: RunResult) -> str:
        refused = sum(output.state != "finished" for output in result.outputs)
        if refused:
            which = f"{refused} of {len(result.outputs)} requests cannot run in such a server"
            raise HeadwayError(
                f"{self.directory}: {which}: give --server more engine.num_blocks, or a longer "
                "engine.max_model_len"
            )
        return (
            "prompts are taken to have been computed whole: the file does not say what the server had cached"
        )


def _columns(path: Path, *names: str) -> list[list[Any]]:
    import pyarrow.parquet as pq

    try:
        return [column.to_pylist() for column in pq.read_table(path, columns=list(names)).columns]
    except (OSError, ValueError, KeyError) as error:
        raise HeadwayError(f"{path}: cannot be read ({error}): record the run with results=all") from error


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
