"""`python run.py`: composes a run with Hydra, runs it, prints one table. `python run.py --help` shows what can be chosen."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import manual, schema, torchrun
from conf import sweep as sweeps
from conf.launch import PORTABLE, Launch, arguments, ending
from core.hooks import load_registry


def main() -> int:
    registry = load_registry()
    if {"-h", "--help"} & set(sys.argv[1:]):
        return manual.show(sys.argv[1:], registry)
    schema.register(registry)
    sweeps.register(registry)
    argv, sweep = arguments([*sys.argv[1:], *torchrun.overrides()], Path(__file__).parent / "conf")
    sys.argv[1:] = sweeps.loosened(argv)
    codes: list[int] = []

    @hydra.main(config_path="conf", config_name="config", **PORTABLE)
    def job(cfg: DictConfig) -> None:
        torchrun.check(cfg, HydraConfig.get().mode, registry)
        if torchrun.serves():
            torchrun.serve(cfg, registry)
        codes.append(Launch(cfg, HydraConfig.get()).run())

    return ending(job, registry, sweep, codes)


if __name__ == "__main__":
    sys.exit(main())
