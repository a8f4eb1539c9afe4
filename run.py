"""`python run.py`: composes a run with Hydra, runs it, prints a table. `--help` shows what can be chosen."""

from __future__ import annotations

import sys

from core.interrupts import interrupts


def main() -> int:
    """Signals are heard before anything that takes a while to import."""
    interrupts.install()
    try:
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import DictConfig

        from core.cli import torchrun
        from core.cli.launch import PORTABLE, Command, Job, ending
        from core.compose.defaults import CONF
    except BaseException as error:
        if not interrupts.caused(error):
            raise
        return interrupts.over(interrupts.exit_code)
    command = Command()

    @hydra.main(config_path="conf", config_name="config", **PORTABLE)
    def job(cfg: DictConfig) -> None:
        torchrun.check(cfg, HydraConfig.get().mode, command.registry)
        if torchrun.serves():
            torchrun.serve(cfg, command.registry)
        command.codes.append(Job(cfg, HydraConfig.get(), command).run())

    return ending(command, [*sys.argv[1:], *torchrun.overrides()], CONF, job)


if __name__ == "__main__":
    sys.exit(main())
