"""VTC against first-come-first-served: how far apart two backlogged clients drift. From the paper to a plot.

    python experiments/vtc_fairness.py [--orders fcfs vtc] [--minutes 6] [--out vtc_fairness]

Setup of Sheng et al., OSDI'24, section 5.2 (overload), simulated: conf/experiment/vtc_fairness.yaml, so that
`python run.py experiment=vtc_fairness order=vtc` prints the same figure. What is measured is
`service_difference` of docs/metrics.md, which the theorem bounds by 2 max(wp L_in, wq M) for two backlogged
clients. Writes OUT.csv, the difference since both were backlogged over time, and OUT.svg and OUT.png where
`pip install altair vl-convert-python` was done (extra `report`).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from core.cli import schema
from core.compose.build import Composition, build
from core.compose.hooks import load_registry
from core.measure.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, ClientService, by_client, service_difference

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose(order: str, seconds: float) -> Composition:
    """What `python run.py experiment=vtc_fairness order=ORDER workload.duration=SECONDS` composes."""
    overrides = ["experiment=vtc_fairness", f"order={order}", f"workload.duration={seconds}"]
    return schema.composition(schema.composed(overrides))


def served(order: str, seconds: float) -> tuple[list[ClientService], float]:
    """What each of the two clients asked and got, and the theorem's bound."""
    registry = load_registry()
    schema.register(registry)
    composition = compose(order, seconds)
    del composition.choices["tracking"]
    run = build(registry, composition)
    outputs = run.execute().outputs
    tokens = run.engine.pool.num_blocks * run.engine.pool.block_size
    bound = 2 * max(PROMPT_WEIGHT * max(o.num_prompt_tokens for o in outputs), OUTPUT_WEIGHT * tokens)
    return list(by_client(outputs).values()), bound


def differences(clients: list[ClientService], every: float = 5.0) -> list[tuple[float, float]]:
    """(time, service difference since both were backlogged first), in the longest spell in which both are."""
    one, other = clients
    spells = [(max(a, c), min(b, d)) for a, b in one.backlogged for c, d in other.backlogged]
    begin, end = max(spells, key=lambda spell: spell[1] - spell[0])
    at = np.arange(begin, end, every)
    lead = other.service(at) - one.service(at)
    return list(zip(at.tolist(), np.abs(lead - lead[0]).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--orders", nargs="+", default=["fcfs", "vtc"])
    parser.add_argument("--minutes", type=float, default=6.0, help="for which the clients go on asking")
    parser.add_argument("--out", type=Path, default=Path("vtc_fairness"))
    args = parser.parse_args()
    runs = {order: served(order, args.minutes * 60) for order in args.orders}
    bound = max(bound for _, bound in runs.values())
    rows = [(order, t, d) for order, (clients, _) in runs.items() for t, d in differences(clients)]
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("order", "seconds", "service_difference"), *rows])
    print(f"{'order':<14}{'largest':>12}   bound {bound:,.0f}")
    for order, (clients, _) in runs.items():
        largest = service_difference(clients)
        print(f"{order:<14}{largest:>12,.0f}   {'within' if largest <= bound else 'beyond'}")
    print(f"wrote {args.out.with_suffix('.csv')}{plot(rows, bound, args.out)}")


def plot(rows: list[tuple[str, float, float]], bound: float, out: Path) -> str:
    try:
        import altair
        import vl_convert  # noqa: F401  what altair needs to write files
    except ImportError:
        return ' (no figure: pip install "headway[report]")'
    data = altair.Data(values=[{"order": o, "seconds": t, "difference": d} for o, t, d in rows])
    lines = (
        altair.Chart(data)
        .mark_line()
        .encode(
            x=altair.X("seconds:Q", title="time (s)"),
            y=altair.Y("difference:Q", title="service difference (weighted tokens)"),
            color="order:N",
        )
    )
    rule = (
        altair.Chart(altair.Data(values=[{"bound": bound}])).mark_rule(strokeDash=[4, 4]).encode(y="bound:Q")
    )
    chart = (lines + rule).properties(
        width=420, height=260, title="Two backlogged clients; dashed: the theorem's bound"
    )
    for suffix in (".svg", ".png"):
        chart.save(str(out.with_suffix(suffix)))
    return f", {out.with_suffix('.svg')}, {out.with_suffix('.png')}"


if __name__ == "__main__":
    main()
