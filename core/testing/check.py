"""`python -m headway check order=mypaper`: the conformance kit on a composition, and one table."""

from __future__ import annotations

import argparse
import textwrap

from .kit import CHECKS, FAIL, Verdict
from .subject import Subject

DESCRIPTION = """Runs the conformance kit on the policies that you name: order=mypaper order.alpha=0.3
cache=radix. Roles that you leave out are filled with every kind of policy, erratic ones too. Exit code 1
if a check fails."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m headway check",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="role=name", help="policies and their parameters, as for run.py"
    )
    parser.add_argument("--seeds", type=int, default=200, help="random cases (200)")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        help="a plugin file or module that is not installed; may be repeated",
    )
    parser.add_argument(
        "--only", choices=list(CHECKS), action="append", help="only these checks; may be repeated"
    )
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected at least 1")
    subject = Subject(tuple(options.words), tuple(options.module))
    subject.refuse_what_cannot_be()
    seeds = range(options.seeds) if options.seed is None else (options.seed,)
    print(f"checking {subject}\n\n{'check':<32} {'runs':>5}  verdict")
    failed = []
    for name in options.only or CHECKS:
        for verdict in CHECKS[name](subject, seeds):
            print(_row(verdict), flush=True)
            if verdict.failed:
                failed.append(verdict)
    for verdict in failed:
        print("\n" + explain(verdict))
    print(f"\n{len(failed)} checks failed" if failed else "\nall checks pass")
    return 1 if failed else 0


def _row(verdict: Verdict) -> str:
    detail = verdict.detail.split("\n")[0]
    if verdict.verdict == FAIL:
        detail = f"seed {verdict.seed}; see below" if verdict.seed is not None else "see below"
    short = textwrap.shorten(detail, 110, placeholder=" ...")
    return f"{verdict.check:<32} {verdict.runs:>5}  {verdict.verdict:<4}  {short}".rstrip()


def explain(verdict: Verdict) -> str:
    """A failure in full: what, the shrunk case, and the steps that lead to it."""
    lines = [
        f"{verdict.check} FAILED" + (f", first at seed {verdict.seed}" if verdict.seed is not None else ""),
        textwrap.indent(verdict.detail, "  "),
    ]
    if verdict.case is not None:
        lines += ["  the smallest case that fails like this:", textwrap.indent(str(verdict.case), "    ")]
    if verdict.steps:
        lines += ["  step by step:", *(f"    {step}" for step in verdict.steps)]
    return "\n".join(lines)
