"""VTC against first-come-first-served: how far apart two backlogged clients drift. From the paper to a plot.

    python experiments/vtc_fairness.py [--orders fcfs vtc] [--minutes 6] [--out vtc_fairness]

Setup of Sheng et al., OSDI'24, section 5.2 (overload), simulated: conf/experiment/vtc_fairness.yaml. Service is wp = 1 per prompt
token and wq = 2 per generated token; the theorem bounds the difference of two backlogged clients by 2 max(wp L_in, wq M).
Writes OUT.csv, and OUT.svg and OUT.png where `pip install altair vl-convert-python` was done (extra `report`).
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from core.build import Composition, build
from core.config import EngineConfig, Hardware, ModelConfig
from core.hooks import load_registry
from headway import Observer, StepRecord

WP, WQ, PROMPT, KV_TOKENS, BLOCK = 1.0, 2.0, 256, 10_000, 16
CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass
class Service(Observer):
    """Service of each client over time, in weighted tokens."""

    every: float = 5.0  # seconds between samples
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    total: dict[str, float] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)  # prompt tokens of a request that were counted: recomputing is no service

    def on_step(self, record: StepRecord) -> None:
        for (request, start, length, _), token in zip(record.plan.chunks, record.tokens, strict=True):
            upto = min(start + length, request.num_prompt_tokens)
            new = max(0, upto - self.served.get(request.id, 0))
            if new:
                self.served[request.id] = upto
            client = request.tags.client
            self.total[client] = self.total.get(client, 0.0) + WP * new + (WQ if token >= 0 else 0.0)
        if not self.samples or record.end >= self.samples[-1][0] + self.every:
            self.samples.append((record.end, dict(self.total)))


def differences(order: str, seconds: float) -> list[tuple[float, float]]:
    """(time, service difference) while both clients are backlogged."""
    choices = {
        "scheduler": ("chunked", {}), "order": (order, {}), "victim": ("newest", {}), "cache": ("none", {}), "eviction": ("lru", {}),
        "executor": ("sim", {}), "workload": ("clients", {"duration": seconds}),
    }  # fmt: skip
    engine = EngineConfig(block_size=BLOCK, num_blocks=KV_TOKENS // BLOCK, max_num_seqs=64)
    service = Service()
    model = ModelConfig(**OmegaConf.load(CONF / "model" / "llama_2_7b.yaml"))
    hardware = Hardware(**OmegaConf.load(CONF / "hardware" / "a10g.yaml"))
    run = build(load_registry(), Composition(choices, engine=engine, model=model, hardware=hardware), [service])
    run.execute()
    return [(t, abs(s.get("client1", 0.0) - s.get("client0", 0.0))) for t, s in service.samples if t <= seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", nargs="+", default=["fcfs", "vtc"])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=Path("vtc_fairness"))
    args = parser.parse_args()
    bound = 2 * max(WP * PROMPT, WQ * KV_TOKENS)
    rows = [(order, t, d) for order in args.orders for t, d in differences(order, args.minutes * 60)]
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("order", "seconds", "service_difference"), *rows])
    print(f"{'order':<14}{'largest':>12}{'at the end':>12}   bound {bound:,.0f}")
    for order in args.orders:
        found = [d for o, _, d in rows if o == order]
        print(f"{order:<14}{max(found):>12,.0f}{found[-1]:>12,.0f}   {'within' if max(found) <= bound else 'beyond'}")
    print(f"wrote {args.out.with_suffix('.csv')}{plot(rows, bound, args.out)}")


def plot(rows: list[tuple[str, float, float]], bound: float, out: Path) -> str:
    try:
        import altair
        import vl_convert  # noqa: F401  what altair needs to write files
    except ImportError:
        return ' (no figure: pip install "headway[report]")'
    data = altair.Data(values=[{"order": o, "seconds": t, "difference": d} for o, t, d in rows])
    lines = altair.Chart(data).mark_line().encode(
        x=altair.X("seconds:Q", title="time (s)"),
        y=altair.Y("difference:Q", title="service difference (weighted tokens)"),
        color="order:N",
    )  # fmt: skip
    rule = altair.Chart(altair.Data(values=[{"bound": bound}])).mark_rule(strokeDash=[4, 4]).encode(y="bound:Q")
    chart = (lines + rule).properties(width=420, height=260, title="Two backlogged clients; dashed: the theorem's bound")
    for suffix in (".svg", ".png"):
        chart.save(str(out.with_suffix(suffix)))
    return f", {out.with_suffix('.svg')}, {out.with_suffix('.png')}"


if __name__ == "__main__":
    main()
