"""`torchrun ... run.py`: one command line in several processes, of which rank 0 runs and the others serve
it."""

from __future__ import annotations

import os
import sys
from typing import Any

from omegaconf import DictConfig

from ..compose.build import build
from ..compose.hooks import Registry
from ..errors import ConfigError, HeadwayError
from . import schema

REFUSED = 2  # exit code, as for anything that is refused before the first step


def processes() -> int:
    """How many run this command line."""
    given = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    return int(os.environ["WORLD_SIZE"]) if given else 1


def serves() -> bool:
    """Whether this process is one of rank 0's others: it writes no folder and prints no table."""
    return processes() > 1 and os.environ["RANK"] != "0"


def overrides() -> list[str]:
    """What keeps Hydra from writing into the run's folder in a process that serves."""
    if not serves():
        return []
    quiet = ["hydra.output_subdir=null", "hydra.run.dir=."]
    return [*quiet, "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def check(cfg: DictConfig, mode: Any, registry: Registry) -> None:
    """Raises ConfigError, in rank 0, where each process would run everything and write the same folder."""
    if (started := processes()) == 1:
        return
    try:
        _check(started, cfg, str(mode), registry)
    except HeadwayError:
        if serves():  # rank 0 says it
            raise SystemExit(REFUSED) from None
        raise


def _check(started: int, cfg: DictConfig, mode: str, registry: Registry) -> None:
    composition = schema.composition(cfg)
    parallel, executor = composition.parallel, composition.choices["executor"][0]
    given = f"torchrun started {started} processes"
    if mode.endswith("MULTIRUN"):
        raise ConfigError(f"{given} for one run, and a sweep is several: start each with its own torchrun")
    if not registry.get("executor", executor).build().torchrun:
        raise ConfigError(f"{given}, and executor={executor} runs in one: start it without torchrun")
    if parallel.world_size != started:
        raise ConfigError(
            f"{given}, and parallel.tp={parallel.tp} parallel.pp={parallel.pp} needs {parallel.world_size}: "
            f"set parallel.tp={started}, or start as many processes as there are ranks"
        )


def serve(cfg: DictConfig, registry: Registry) -> None:
    """Builds the run up to its executor, which then serves rank 0 and ends the process."""
    try:
        build(registry, schema.composition(cfg))
    except HeadwayError as error:
        rank = f"rank {os.environ['RANK']}"
        print(f"error: {error}" if rank in str(error) else f"error: {rank}: {error}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
