"""Hydra's own sweeper, except that jobs are checked by core/cli/sweep.py. Hydra takes sweepers from
`hydra_plugins` alone.

Other Hydra applications in the same environment find this module too, so it imports nothing of Headway before
it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser


class CheckedSweeper(BasicSweeper):
    """Refuses a sweep before its first job for all that can be known of any of its jobs."""

    def sweep(self, arguments: list[str]) -> Any:
        from core.cli.sweep import check_jobs

        loader, config = self.hydra_context.config_loader, self.config
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(
            [*self._parse_config(), *arguments]
        )
        jobs = [job for batch in self.split_arguments(overrides, self.max_batch_size) for job in batch]
        check_jobs(jobs, lambda job: loader.load_sweep_config(config, list(job)))
        return super().sweep(arguments)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """`sweep` has done it; Hydra's way takes 0.1 s a job."""
