"""What surrounds a run on the command line: a command, its jobs, how each ends, the comparison of a sweep."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..compose.build import Run, build
from ..compose.hooks import Registry, load_registry
from ..errors import ConfigError, HeadwayError
from ..interrupts import interrupts, say
from ..measure import report, results
from ..measure.metrics import summarize
from ..outputs import RunResult
from ..outside import Observer
from . import manual, schema
from . import sweep as sweeps
from .arguments import arguments
from .explain import complain, describe, explain, shows_traceback
from .folders import Claims, Lock, Refused, Sweep, check_inputs, identity, prepare
from .stored import concealed, hide, stored, watch_environment

FINISHED, FAILED, CONFIG = 0, 1, 2  # exit codes; CONFIG: refused before the first step. Signals: 128 + number

_OLD_HYDRA = tuple(map(int, hydra.__version__.split(".")[:2])) < (1, 4)
PORTABLE: dict[str, Any] = {"version_base": "1.3"} if _OLD_HYDRA else {"execution_whitelist": ()}


@dataclass
class Command:
    """One command: its sweep's folder, which it holds, and how its jobs ended, written or not."""

    registry: Registry = field(default_factory=Registry)
    sweep: Sweep | None = None
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)  # by folder: what result.json holds
    codes: list[int] = field(default_factory=list)
    claims: Claims = field(default_factory=Claims)

    def hold(self, folder: Path) -> Sweep:
        if self.sweep is None:
            self.sweep = Sweep(folder)
        return self.sweep

    def let_go(self) -> None:
        if self.sweep is not None:
            self.sweep.release()
        self.claims.give_back_empty()

    def results(self) -> list[dict[str, Any]]:
        """Of the jobs in the sweep's folder, this command's and earlier ones', in their order."""
        if self.sweep is None:
            return []
        found, problems = results.read_results(self.sweep.folder)
        for problem in problems:
            say(f"warning: {problem}; its job counts as not run", error=True)
        known = {str(Path(r["directory"]).resolve()): r for r in found} | self.ended
        return [known[key] for key in sorted(known, key=lambda k: (len(Path(k).name), Path(k).name))]


class Job:
    """One job: claim a folder, build, run, write, print. An error ends in result.json; a sweep goes on."""

    def __init__(self, cfg: DictConfig, hydra_conf: Any, command: Command) -> None:
        self.cfg, self.command = cfg, command
        task: Any = OmegaConf.to_container(hydra_conf.overrides.task, resolve=False)
        self.overrides: list[str] = task
        self.directory = Path(hydra_conf.runtime.output_dir)  # a job of a sweep gets one by its identity
        self.sweep: Path | None = None
        self.group = self.identity = ""
        if str(hydra_conf.mode).endswith("MULTIRUN"):
            self.sweep = Path(hydra_conf.runtime.cwd, hydra_conf.sweep.dir).resolve()
            self.group = "_".join(self.sweep.parts[-2:])
            wanted = self.directory.resolve().relative_to(self.sweep)
            self.wanted = str(wanted) if wanted.parts else str(hydra_conf.job.num)
            self.directory = self.sweep / self.wanted
        self.files: Sequence[str] = results.FILES
        self.result: RunResult | None = None
        # a result and its summary, which takes a while
        self._summed: tuple[RunResult | None, dict[str, Any]] = (None, {})
        self._written: dict[str, Any] = {}  # what result.json holds
        self._room: results.Room | None = None

    def run(self) -> int:
        """The job's exit code. Raises KeyboardInterrupt, once all is written, when a signal has come."""
        interrupts.hold()
        try:
            self.identity = identity(self.cfg)
            if self.sweep is not None:
                self.directory = self.command.hold(self.sweep).job(self.wanted, self.identity)
                code = FINISHED if self._is_done() else self._attempt()
            else:
                with Lock(self.directory):
                    check_inputs(self.directory, self.cfg)
                    code = self._attempt()
        except Refused as error:
            complain(error)
            code = CONFIG
        except Exception as error:  # no room, no right to write
            code = self._failed(error)
        interrupts.release()
        return code

    def _attempt(self) -> int:
        try:
            prepare(self.directory, self.cfg, self.overrides, self.identity)
            self._room = results.Room(self.directory)
            config = stored(self.cfg)
            results.write_text(self.directory / results.CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))
            try:
                interrupts.release()
                run = self._build(config)
                say(hide(f"{run.name}\n{report.composed(run)}"))
                result = run.execute()
            finally:
                interrupts.hold()
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if interrupts.caused(error):
                self._end("interrupted", "" if self.result else "interrupted before the first step")
                say(f"results: {self.directory}")
                raise KeyboardInterrupt from None
            return self._failed(error)
        status, problem = verdict(result)
        self._end(status, problem)
        say(
            f"\n{report.run_table(self._summary(result))}\n{_answers(run, result)}\nresults: {self.directory}"
        )
        if problem:
            say(f"error: {problem}", error=True)
        if status == "interrupted":
            raise KeyboardInterrupt
        return FINISHED if self.command.ended[str(self.directory)]["status"] == "finished" else FAILED

    def _build(self, config: dict[str, Any]) -> Run:
        composition = replace(schema.composition(self.cfg), concealed=concealed())
        self.files = composition.results.files
        about = {"config": config, "overrides": self.overrides, "group": self.group}
        observers = [First(self._first)]
        return build(self.command.registry, composition, observers, directory=self.directory, **about)

    # ---- how it ended -------------------------------------------------------------------------------------

    def _first(self, result: RunResult) -> None:
        """What came out is written before any larger file, for which there may be no room."""
        self.result = result
        self._write(*verdict(result))

    def _failed(self, error: BaseException) -> int:
        self.result = self.result or getattr(error, "partial", None)
        if isinstance(error, SystemExit):
            error = _quit(error)
        trace = "".join(traceback.format_exception(error))
        self._end("failed", describe(error), trace)
        complain(error)
        say(f"results: {self.directory}")
        refused = isinstance(error, HeadwayError) and not isinstance(error, OSError) and self.result is None
        return CONFIG if refused else FAILED

    def _end(self, status: str, error: str, trace: str = "") -> None:
        """Writes what has changed since `_first`, and what it ran on. The table tells what has no room."""
        try:
            self._write(status, error, trace)
            if self._room is not None:
                self._room.give_up()
            if results.VERSIONS in self.files:
                results.write_json(self.directory / results.VERSIONS, results.environment())
        except OSError as problem:
            say(f"error: {problem}", error=True)
            told = self.command.ended[str(self.directory)]
            told["status"], told["error"] = "failed", told["error"] or str(problem)

    def _write(self, status: str, error: str, trace: str = "") -> None:
        summary = self._summary(self.result) if self.result else {}
        data: dict[str, Any] = {"status": status, "error": hide(error), "overrides": self.overrides}
        data |= {"seed": self.cfg.seed, "config": self.identity, "summary": summary}
        data |= {"traceback": hide(trace)} if trace else {}
        self.command.ended[str(self.directory)] = data | {"directory": str(self.directory)}
        if data == self._written:
            return
        self._write_result(data)
        if summary and results.SUMMARY in self.files:
            results.write_json(self.directory / results.SUMMARY, summary)

    def _summary(self, result: RunResult) -> dict[str, Any]:
        if self._summed[0] is not result:
            self._summed = result, summarize(result)
        return self._summed[1]

    def _write_result(self, data: dict[str, Any]) -> None:
        """Where there is no room for all of it, how the job ended matters more than the traceback."""
        try:
            results.write_json(self.directory / results.RESULT, data)
        except OSError:
            if self._room is not None:
                self._room.give_up()
            data = {key: value for key, value in data.items() if key != "traceback"}
            shorter = data | {"error": data["error"][:200]}
            results.write_json(self.directory / results.RESULT, shorter, indent=None)
        self._written = data

    def _is_done(self) -> bool:
        """A sweep that is started again in its own folder (hydra.sweep.dir=...) runs only what is missing."""
        try:
            earlier = results.read_result(self.directory)
        except results.Unreadable as problem:
            say(f"warning: {problem}; the job counts as not run and runs again", error=True)
            return False
        if earlier is None or earlier["status"] != "finished":
            return False
        say(f"{self.directory}: finished already, left as it is")
        return True


class First(Observer):
    """The observer that hears of a run's end before all others, which may fail."""

    def __init__(self, heard: Callable[[RunResult], None]) -> None:
        self.plugin_name, self._heard = "result.json", heard

    def close(self, result: RunResult) -> None:
        self._heard(result)


def verdict(result: RunResult) -> tuple[str, str]:
    """How a run ended and what is wrong with it: one that refused everybody is no result."""
    refused = [o for o in result.outputs if o.state == "rejected"]
    if result.status == "finished" and refused and len(refused) == len(result.outputs):
        return "failed", f"all {len(refused)} requests were rejected; the first: {refused[0].finish_reason}"
    if result.status == "interrupted" and not result.num_steps:
        return result.status, "interrupted before the first step"
    return result.status, result.error


def _quit(error: SystemExit) -> HeadwayError:
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename}:{where.lineno}: {where.name}"
    quitting = HeadwayError(f"{place} called sys.exit({error.code}): raise an error instead")
    quitting.__cause__ = error
    return quitting


# ---- the command -----------------------------------------------------------------------------------------


def ending(command: Command, argv: list[str], conf: Path, job: Callable[[], None]) -> int:
    """Runs Hydra; whatever happens becomes a message and an exit code. A sweep ends with its comparison."""
    try:
        code = _launched(command, argv, conf, job)
        compared = _compared(command)
        code = code or compared
    except SystemExit as stop:  # Hydra's, after --help
        code = stop.code if isinstance(stop.code, int) else FAILED if stop.code else FINISHED
    finally:
        command.let_go()
    return interrupts.over(interrupts.exit_code if interrupts.received else code)


def _compared(command: Command) -> int:
    found = command.results()
    if found and command.sweep is not None:
        say(f"\n{compare(command.sweep.folder, found)}")
    failed = FAILED if any(r["status"] == "failed" for r in found) else FINISHED
    return max(command.codes, default=FINISHED) or failed


def _launched(command: Command, argv: list[str], conf: Path, job: Callable[[], None]) -> int:
    """The exit code, as far as it is known before the jobs' own."""
    try:
        try:
            command.registry = load_registry()
            if {"-h", "--help"} & set(argv):
                return manual.show(argv, command.registry)
            schema.register(command.registry)
            sweeps.register(command.registry)
            watch_environment()
            command.claims.register()
            given, sweep = arguments(argv, conf)
            sys.argv[1:] = sweeps.loosened(given)
            if sweep is not None:
                command.hold(sweep.resolve())
            job()
        finally:
            interrupts.hold()
    except (Exception, KeyboardInterrupt) as error:
        return _said(error, command.registry)
    return FINISHED


def _said(error: BaseException, registry: Registry) -> int:
    """The exit code of an error that no job has caught, which is printed."""
    if interrupts.caused(error):
        say("interrupted: what was done is written and marked so", error=True)
        return interrupts.exit_code
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        complain(error)
        return CONFIG if isinstance(error, ConfigError) else FAILED
    if shows_traceback():
        say(hide("".join(traceback.format_exception(error))), error=True)
    say(f"error: {hide(explain(error, registry))}", error=True)
    return CONFIG


def compare(sweep: Path, found: list[dict[str, Any]]) -> str:
    """Writes comparison.csv, .json and .md beside the runs; answers the table."""
    cells = report.comparison_rows(found)
    notes = [*report.doubts(found), *report.notes(found)]
    marked = [report.table(cells, markdown=True), *(f"\n{note}" for note in notes), ""]
    errors = [f"  job {Path(r['directory']).name}: {r['error'].splitlines()[0]}" for r in found if r["error"]]
    try:
        results.write_text(sweep / "comparison.csv", report.comparison_csv(found))
        results.write_text(sweep / "comparison.md", "\n".join(marked))
        results.write_json(sweep / "comparison.json", report.with_ties(found))
        written = f"comparison: {sweep / 'comparison.md'}"
    except OSError as error:
        written = f"the comparison cannot be written: {error}"
    return "\n".join([report.table(cells), *notes, *errors, written])


def _answers(run: Run, result: Any) -> str:
    """The first few prompts and answers, for workloads that hold real text."""
    tokenizer = run.engine.executor.tokenizer
    spoken = [o for o in result.outputs if o.prompt and o.output_token_ids][:3]
    if tokenizer is None:
        return ""
    texts = [tokenizer.answer(o.prompt_token_ids, o) for o in spoken]
    return "".join(f"\n  > {o.prompt}\n    {text.strip()}\n" for o, text in zip(spoken, texts, strict=True))
