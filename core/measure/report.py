"""What a person reads: the composition, the table of one run, the table that compares runs. Text in, text
out."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..compose.build import Run
from .doubt import TIE, Marks, legend, stated
from .metrics import LATENCIES, PERCENTILES
from .results import comparison, same_decisions, varied

#: Columns of the comparison: summary key, heading, format.
COMPARED = (
    ("completed", "done", "d"),
    ("duration", "time s", ".2f"),
    ("output_throughput", "tok/s", ".1f"),
    ("request_goodput", "goodput", ".2f"),
    ("mean_ttft_ms", "TTFT ms", ".1f"),
    ("p99_ttft_ms", "P99", ".1f"),
    ("mean_tpot_ms", "TPOT ms", ".2f"),
    ("p99_itl_ms", "ITL P99", ".2f"),
    ("mean_e2el_ms", "E2EL ms", ".1f"),
    ("prefix_hit_rate", "hits", ".1%"),
    ("preemptions", "preempt", "d"),
    ("kv_peak_use", "KV peak", ".1%"),
    ("jain_index", "Jain", ".3f"),
    ("service_difference", "service diff", ".0f"),
    ("policy_time_per_step_us", "us/step", ".1f"),
)


def composed(run: Run) -> str:
    """One line per role: its choice and its parameters, those that are None left out; then the model and the
    engine's limits.

    A parameter that was left open and derived is shown as what it became."""
    width = max(map(len, run.plugins))
    lines = []
    engine = run.engine
    for role, plugin in run.plugins.items():
        given = run.composition.choices[role][1] | _derived(role, engine.derived)
        shown = " ".join(
            f"{f.name}={given[f.name]}"
            for f in plugin.parameters()
            if f.name in given and given[f.name] is not None
        )
        lines.append(f"  {role:<{width}}  {plugin.name:<12} {shown}".rstrip())
    c = run.composition
    lines.append(f"  {'model':<{width}}  {c.model.name_or_path}")
    if c.parallel.world_size > 1:
        lines.append(f"  {'parallel':<{width}}  tp={c.parallel.tp} pp={c.parallel.pp}")
    lines.append(
        f"  {'engine':<{width}}  {engine.pool.num_blocks} KV blocks of {engine.pool.block_size} tokens, "
        f"{engine.config.max_num_seqs} sequences, "
        f"{engine.config.max_num_batched_tokens} tokens per step, max_inflight={engine.max_inflight}, "
        f"context {engine.max_model_len}"
    )
    return "\n".join(lines)


def _derived(node: str, derived: dict[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(f"{node}."): value for name, value in derived.items() if name.startswith(f"{node}.")
    }


def table(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Columns aligned; the first row is the heading, the first column is flush left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    edge, rule = ("| ", "|") if markdown else ("  ", "-")
    lines = []
    for n, row in enumerate(rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(edge + (" | " if markdown else "  ").join(cells) + (" |" if markdown else ""))
        if n == 0:
            lines.append(
                "|" + "|".join("-" * (w + 2) for w in widths) + "|"
                if markdown
                else "  " + rule * (sum(widths) + 2 * (len(widths) - 1))
            )
    return "\n".join(lines)


def number(value: Any, form: str) -> str:
    if not _known(value):
        return "-"
    return format(value, "," + form if form[-1] in "df" else form)


def run_table(s: dict[str, Any]) -> str:
    """The numbers of one run."""
    facts = [
        (
            "requests",
            f"{s['completed']} of {s['num_requests']} finished"
            + (f", {s['rejected']} rejected" if s["rejected"] else "")
            + (f", {s['aborted']} aborted" if s["aborted"] else ""),
        ),
        ("duration", f"{s['duration']:.2f} s, {s['num_steps']:,} steps, device busy {s['busy_share']:.0%}"),
        (
            "throughput",
            f"{s['request_throughput']:.2f} requests/s, {s['output_throughput']:,.1f} output tokens/s"
            + f", {s['total_token_throughput']:,.1f} tokens/s",
        ),
        ("prefix hits", f"{s['prefix_hit_rate']:.1%} ({s['cached_tokens']:,} prompt tokens)"),
        (
            "preemptions",
            f"{s['preemptions']:,}, {s['recomputed_tokens']:,} tokens recomputed, {s['evictions']:,} "
            "evictions",
        ),
        ("KV peak use", f"{s['kv_peak_use']:.1%} of {s['kv_blocks']:,} blocks"),
        ("policy time", f"{s['policy_time_per_step_us']:.1f} us per step"),
    ]
    if s["warmup_seconds"]:
        facts.append(
            ("warm-up", f"{s['warmup_seconds']:.2f} s before the first request, no part of the duration")
        )
    if s["late_preparations"]:
        facts.append(
            (
                "warning",
                f"{s['late_preparations']:,} kernels compiled or graphs captured after the first request: "
                "latencies hold that time",
            )
        )
    facts[1:1] = [("rejected", f"{kind['count']:,}: {kind['reason']}") for kind in s.get("rejections", ())]
    if "slo_attainment" in s:
        facts.append(
            ("goodput", f"{s['request_goodput']:.2f} requests/s, SLO attainment {s['slo_attainment']:.1%}")
        )
    if "num_clients" in s:
        facts.append(
            (
                "fairness",
                f"{s['num_clients']} clients, Jain {number(s.get('jain_index'), '.3f')}, service difference "
                f"{s['service_difference']:,.0f}",
            )
        )
    if "time_model" in s:
        facts.append(("simulated", f"{s['time_model']}; {stated(s['time_model_error'])}"))
    if "saw_truth" in s:
        facts.append(("bound", f"{s['saw_truth']} saw what no deployed policy can see"))
    latencies = [["", "mean", *(f"P{p}" for p in PERCENTILES)]]
    for name in LATENCIES:
        keys = (f"mean_{name}_ms", *(f"p{p}_{name}_ms" for p in PERCENTILES))
        latencies.append([f"{name.upper()} ms", *(number(s[k], ".2f") for k in keys)])
    return "\n".join(f"  {name:<12} {value}" for name, value in facts) + "\n\n" + table(latencies)


def comparison_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The comparison as cells: what was varied, then the main metrics that any of the runs has, then how it
    ended."""
    rows = comparison(results)
    metrics = [
        (key, heading, form) for key, heading, form in COMPARED if any(_known(row.get(key)) for row in rows)
    ]
    keys = ["job", *varied(results)]
    heading = [*keys, *(h for _, h, _ in metrics), "status"]
    marks = Marks.of(results, varied(results))
    marked = {key: marks.marked(key) for key, _, _ in metrics}
    cells = [heading]
    for result, row in zip(results, rows, strict=True):
        known = [_marked(number(row.get(k), f), result["directory"], marked[k]) for k, _, f in metrics]
        cells.append([*(str(row[k]) for k in keys), *known, row["status"]])
    return cells


def _marked(cell: str, directory: str, marked: set[str]) -> str:
    """With a mark, or with room for one in a column that has marks."""
    return cell + (TIE if directory in marked else " ") if marked else cell


def with_ties(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparison's rows, each with the jobs that it ties with: {"ties": {metric: [job]}}."""
    tied = Marks.of(results, varied(results)).tied(key for key, _, _ in COMPARED)
    rows = comparison(results)
    for result, row in zip(results, rows, strict=True):
        if own := tied.get(result["directory"]):
            row["ties"] = {
                metric: [Path(directory).name for directory in there] for metric, there in own.items()
            }
    return rows


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def doubts(results: list[dict[str, Any]]) -> list[str]:
    """What the comparison's marks mean, and what nobody can know from it."""
    return legend(Marks.of(results, varied(results)).found)


def notes(results: list[dict[str, Any]]) -> list[str]:
    """What a reader of the comparison should know: which choices made no difference."""
    said = []
    for group in same_decisions(results):
        jobs = [Path(results[i]["directory"]).name for i in group]
        given = [dict(o.partition("=")[::2] for o in results[i]["overrides"]) for i in group]
        values = {key: list(dict.fromkeys(own.get(key, "") for own in given)) for key in varied(results)}
        differ = " ".join(f"{key}={','.join(each)}" for key, each in values.items() if len(each) > 1)
        what = f"{differ} made no difference to them" if differ else "they are the same run"
        said.append(
            f"note: jobs {', '.join(jobs[:-1])} and {jobs[-1]} took the same decisions, step for step: {what}"
        )
    return said


def comparison_csv(results: list[dict[str, Any]]) -> str:
    """All metrics, one line per run."""
    rows = comparison(results)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
