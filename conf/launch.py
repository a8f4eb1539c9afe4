"""What surrounds a run on the command line: arguments, one job, errors in plain words, the comparison that ends a sweep."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core import report, results
from core.build import Run, build
from core.errors import ConfigError, HeadwayError
from core.hooks import Registry, load_registry
from core.metrics import summarize

from . import schema
from .explain import complain, describe, explain, shows_traceback

FINISHED, FAILED, CONFIG, INTERRUPTED = 0, 1, 2, 130  # exit codes; CONFIG: refused before the first step

_OLD_HYDRA = tuple(map(int, hydra.__version__.split(".")[:2])) < (1, 4)
PORTABLE: dict[str, Any] = {"version_base": "1.3"} if _OLD_HYDRA else {"execution_whitelist": ()}


def arguments(argv: list[str], conf: Path) -> tuple[list[str], Path]:
    """What Hydra is given for what the user typed, and the folder of a sweep.

    `model=<path or hub id>` is no option of the group, so it becomes `model=custom model.name_or_path=...`. The sweep's folder
    is named here because Hydra reports it to nobody when a job fails.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing; `ending` prints
    given: list[str] = []
    for argument in argv:
        key, _, value = argument.partition("=")
        if key == "model" and ("/" in value or Path(value).is_dir()) and not (conf / "model" / f"{value}.yaml").exists():
            given += ["model=custom", f"model.name_or_path='{value}'"]
        else:
            given.append(argument)
    given.sort(key=lambda a: a not in ("--multirun", "-m"))  # Hydra's parser wants its flags before the overrides
    named = [a.partition("=")[2] for a in given if a.startswith("hydra.sweep.dir=")]
    if named:
        return given, Path(named[-1])
    sweep = Path("multirun") / f"{datetime.now():%Y-%m-%d}" / f"{datetime.now():%H-%M-%S}"
    if any(a in ("--multirun", "-m") or a.startswith(("experiment=", "+experiment=")) for a in given):
        given.append(f"hydra.sweep.dir={sweep}")
    return given, sweep


class Launch:
    """One job: build, run, write, print. Errors end in `result.json` and in the exit code, so that a sweep goes on."""

    def __init__(self, cfg: DictConfig, hydra_conf: Any) -> None:
        self.cfg = cfg
        self.directory = Path(hydra_conf.runtime.output_dir)
        self.overrides = list(hydra_conf.overrides.task)
        sweep = Path(hydra_conf.sweep.dir)
        self.group = "_".join(sweep.parts[-2:]) if str(hydra_conf.mode).endswith("MULTIRUN") else ""

    def run(self) -> int:
        if self._is_done():
            print(f"{self.directory}: finished already, left as it is")
            return FINISHED
        self.directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.cfg, self.directory / results.CONFIG, resolve=True)
        try:
            run = self._build()
            print(f"{run.name}\n{report.composed(run)}", flush=True)
            result = run.execute()
        except KeyboardInterrupt:
            self._write("interrupted", {}, "interrupted before the first step")
            raise
        except Exception as error:
            partial = getattr(error, "partial", None)
            self._write("failed", summarize(partial) if partial else {}, describe(error), traceback.format_exc())
            complain(error)
            print(f"results: {self.directory}")
            return CONFIG if isinstance(error, HeadwayError) and partial is None else FAILED
        summary = summarize(result)
        self._write(result.status, summary)
        print(f"\n{report.run_table(summary)}\n{_answers(run, result)}\nresults: {self.directory}", flush=True)
        if result.status == "interrupted":
            raise KeyboardInterrupt
        return FINISHED

    def _build(self) -> Run:
        composition = schema.composition(self.cfg)
        config: Any = OmegaConf.to_container(self.cfg, resolve=True)
        return build(
            load_registry(), composition, directory=self.directory, config=config, overrides=self.overrides, group=self.group
        )  # fmt: skip

    def _write(self, status: str, summary: dict[str, Any], error: str = "", trace: str = "") -> None:
        results.write_json(self.directory / results.VERSIONS, results.environment())
        if summary:
            results.write_json(self.directory / results.SUMMARY, summary)
        results.write_result(self.directory, status, summary, error=error, traceback=trace, overrides=self.overrides, seed=self.cfg.seed)

    def _is_done(self) -> bool:
        """A sweep that is started again in its own folder (hydra.sweep.dir=...) runs only what is missing."""
        if not self.group:
            return False
        earlier = [r for r in results.read_results(self.directory.parent) if Path(r["directory"]) == self.directory]
        return bool(earlier) and earlier[0]["status"] == "finished" and earlier[0]["overrides"] == self.overrides


def ending(job: Callable[[], None], registry: Registry, sweep: Path, codes: list[int]) -> int:
    """Runs Hydra and turns whatever happens into a message and an exit code; a sweep ends with its comparison all the same."""
    code = FINISHED
    try:
        job()
    except KeyboardInterrupt:
        print("interrupted: what was done is written and marked so", file=sys.stderr)
        code = INTERRUPTED
    except (HydraException, OmegaConfBaseException) as error:
        if shows_traceback():
            traceback.print_exc()
        print(f"error: {explain(error, registry)}", file=sys.stderr)
        code = CONFIG
    except Exception as error:
        complain(error)
        code = CONFIG if isinstance(error, ConfigError) else FAILED
    found = results.read_results(sweep) if sweep.is_dir() else []
    if found:
        print(f"\n{compare(sweep, found)}")
    failed = FAILED if any(r["status"] == "failed" for r in found) else FINISHED
    return code or max(codes, default=FINISHED) or failed


def compare(sweep: Path, found: list[dict[str, Any]]) -> str:
    """Writes comparison.csv, .json and .md beside the runs; answers the table."""
    cells = report.comparison_rows(found)
    (sweep / "comparison.csv").write_text(report.comparison_csv(found))
    notes = report.notes(found)
    (sweep / "comparison.md").write_text("\n".join([report.table(cells, markdown=True), *(f"\n{note}" for note in notes), ""]))
    results.write_json(sweep / "comparison.json", results.comparison(found))
    errors = [f"  job {Path(r['directory']).name}: {r['error'].splitlines()[0]}" for r in found if r["error"]]
    return "\n".join([report.table(cells), *notes, *errors, f"comparison: {sweep / 'comparison.md'}"])


def _answers(run: Run, result: Any) -> str:
    """The first few prompts and answers, for workloads that hold real text."""
    tokenizer = getattr(run.engine.executor, "tokenizer", None)
    spoken = [o for o in result.outputs if o.prompt and o.output_token_ids][:3]
    if tokenizer is None:
        return ""
    texts = [tokenizer.answer(o.prompt_token_ids, o) for o in spoken]
    return "".join(f"\n  > {o.prompt}\n    {text.strip()}\n" for o, text in zip(spoken, texts, strict=True))
