"""`python -m headway whatif RUN order=...`: the clock that is fitted to a recorded run, and what is said of
other policies."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from core.cli import main as cli
from core.cli.whatif import Outcome, changed, changes, compared
from core.errors import ConfigError, HeadwayError
from plugins.executors.profile import Terms
from plugins.executors.step_fit import FEWEST, profile_of_run, samples_of

ROOT = Path(__file__).resolve().parent.parent
CLOCK = Terms(0.004, [0], [2e-5], 3e-6, 4e-8, 1e-8, 0.0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A run of short and long prompts that wait for each other, in the time of a roofline."""
    folder = tmp_path_factory.mktemp("runs") / "recorded"
    words = [
        "executor=sim",
        "model=qwen3_0_6b",
        "workload=random",
        "workload.num_requests=60",
        "workload.arrival=poisson",
    ]
    words += [
        "workload.rate=300",
        "workload.input_len=[50,4000]",
        "workload.output_len=[5,60]",
        "engine.num_blocks=2500",
    ]
    command = [sys.executable, "run.py", *words, "tracking=none", f"hydra.run.dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def copy(recorded, tmp_path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def asked(capsys, *argv: object) -> dict:
    code = cli.main(["whatif", *map(str, argv), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


# ---- the clock -------------------------------------------------------------------------------------------


def written(folder: Path, steps: list[tuple[float, float, int, list[int], list[int]]]) -> Path:
    start, end, running, starts, lengths = map(list, zip(*steps, strict=True))
    number = list(range(len(steps)))
    pq.write_table(
        pa.table({"step": number, "start": start, "end": end, "num_running": running}),
        folder / "steps.parquet",
    )
    pq.write_table(
        pa.table({"step": number, "starts": starts, "lengths": lengths}), folder / "decisions.parquet"
    )
    return folder


def test_a_step_takes_what_passed_since_the_one_before_it_unless_nobody_was_there(tmp_path):
    """0.5 s of host between the first two steps, an idle second before the third, and two that overlap."""
    steps = [
        (0.0, 1.0, 1, [0], [9]),
        (1.5, 2.0, 0, [9], [1]),
        (3.0, 3.25, 1, [0], [5]),
        (3.1, 3.5, 1, [5], [1]),
    ]
    assert [seconds for _, _, seconds in samples_of(written(tmp_path, steps))] == [1.0, 1.0, 0.25, 0.25]


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_fitted_clock_is_right_on_average_and_states_how_far_it_is_off(copy, noise):
    """Noise of 30% either way: the mean over all steps is kept, which least relative error alone would not
    do."""
    rng, now, steps = random.Random(0), 0.0, []
    for _ in range(600):
        decodes = rng.randrange(1, 60)
        lengths = [1] * decodes + [rng.randrange(2, 400) for _ in range(rng.randrange(3))]
        starts = [rng.randrange(1500) for _ in lengths]
        took = CLOCK.seconds(starts, lengths) * rng.uniform(1 - noise, 1 + noise)
        steps.append((now, now + took, 5, starts, lengths))
        now += took
    profile = profile_of_run(written(copy, steps))
    predicted = sum(profile.step_time(starts, lengths) for _, _, _, starts, lengths in steps)
    assert predicted == pytest.approx(now, rel=0.01)
    assert profile.stated_error == pytest.approx(0.9 * noise, abs=0.12 if noise else 0.005)


def test_too_few_steps_are_refused_and_a_run_without_its_steps(copy):
    written(copy, [(float(i), i + 1.0, 1, [0], [3]) for i in range(FEWEST - 1)])
    with pytest.raises(ConfigError, match=f"{FEWEST - 1} steps are too few"):
        profile_of_run(copy)
    (copy / "steps.parquet").unlink()
    with pytest.raises(ConfigError, match=r"results\.files must hold steps\.parquet and decisions\.parquet"):
        samples_of(copy)


# ---- what would change -----------------------------------------------------------------------------------


def test_a_policy_that_helps_is_told_from_one_that_changes_nothing(recorded, capsys):
    found = asked(capsys, recorded, "order=sjf,fcfs", "predictor=oracle")
    assert [change["change"] for change in found["changes"]] == [
        "order=sjf predictor=oracle",
        "order=fcfs predictor=oracle",
    ]
    assert found["clock"]["name"].startswith("profile of the run") and 0 <= found["clock"]["error"] < 0.1
    (ttft,) = [row for row in found["metrics"] if row["metric"] == "mean_ttft_ms"]
    assert ttft["as_it_was"] == pytest.approx(ttft["recorded"], rel=0.05)
    shorter, same = ttft["changes"]
    assert shorter["verdict"] == "better" and shorter["change"] < -0.1
    assert same == {"value": ttft["as_it_was"], "change": 0.0, "verdict": "="}
    truth = json.loads((recorded / "summary.json").read_text())
    assert {row["metric"]: row["recorded"] for row in found["metrics"]}.items() <= truth.items()


def test_what_a_person_reads_says_how_sure_it_is(recorded, capsys):
    assert cli.main(["whatif", str(recorded), "predictor=oracle", "order=sjf", "scheduler=chunked,fcfs"]) == 0
    text = capsys.readouterr().out
    for part in (
        "clock: profile of the run",
        "off by decode steps",
        "every change has predictor=oracle order=sjf\n",
        "scheduler=chunked",
        "steps with predictor=oracle order=sjf scheduler=fcfs are larger than any that was recorded",
        "= is a difference from the run as it was",
    ):
        assert part in text


def test_a_tie_is_a_difference_within_what_the_simulation_was_off_by():
    def outcome(ttft: float, hits: float) -> Outcome:
        return Outcome("", {"mean_ttft_ms": ttft, "prefix_hit_rate": hits, "time_model_error": 0.02}, 0.0)

    recorded = {"mean_ttft_ms": 100.0, "prefix_hit_rate": 0.5}
    outcomes = [outcome(90.0, 0.5), outcome(81.5, 0.499), outcome(80.0, 0.5)]
    ttft, hits = compared(recorded, outcomes)
    assert ttft["doubt"] == pytest.approx(0.1) and [c["verdict"] for c in ttft["changes"]] == ["=", "better"]
    assert hits["doubt"] == 0.0 and [c["verdict"] for c in hits["changes"]] == ["worse", "="], (
        "no time, and it was exact"
    )


@pytest.mark.parametrize(
    "words, change, expected",
    [
        (["order=vtc", "order.wq=2", "seed=1"], ["order=sjf"], ["seed=1", "order=sjf"]),
        (["order=vtc", "order.wq=2"], ["order.wq=3"], ["order=vtc", "order.wq=3"]),
        (["scheduler=fcfs", "slo.ttft=1"], ["policy=sarathi"], ["slo.ttft=1", "policy=sarathi"]),
    ],
)
def test_a_change_takes_the_place_of_what_it_changes(words, change, expected):
    assert changed(words, change) == expected


def test_changes_are_every_combination_of_what_is_listed():
    found = list(changes(["order=sjf,vtc", "cache=none", "order.weights={a: 1, b: 2}"]))
    assert found == [[f"order={name}", "cache=none", "order.weights={a: 1, b: 2}"] for name in ("sjf", "vtc")]


@pytest.mark.parametrize(
    "words, problem",
    [
        (["workload.rate=3"], "workload.rate=3: expected POLICY=NAME"),
        (["order"], "order: expected POLICY=NAME"),
        (["order=srpt"], "order=srpt needs a predictor"),
        (["order=sjff"], "sjf"),
    ],
)
def test_a_change_that_cannot_be_is_refused_before_anything_runs(recorded, capsys, words, problem):
    assert cli.main(["whatif", str(recorded), *words]) == 2
    assert problem in capsys.readouterr().err


def test_a_run_that_cannot_be_repeated_is_refused(copy, capsys):
    def refused(problem: str) -> None:
        assert cli.main(["whatif", str(copy), "order=program_fcfs"]) == 2
        assert problem in capsys.readouterr().err

    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 7}))
    refused("its overrides compose another run today:\n  seed=0, recorded with 7")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    requests = pq.read_table(copy / "requests.parquet")
    pq.write_table(requests.slice(1), copy / "requests.parquet")
    refused("its workload gives other requests today: 1 of 59, 'r0' among them")
    (copy / "requests.parquet").unlink()
    refused("record the run with results=all")
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"status": "interrupted"}))
    refused("its run interrupted: expected one that finished")
    (copy / "result.json").unlink()
    refused("is no run's directory")


def test_a_record_of_another_model_fits_no_clock(recorded):
    from core.cli.whatif import Recorded, Simulations, check, schema

    simulations = Simulations(Recorded.read(recorded))
    cfg = simulations.composed([*simulations.recorded.words, "model=qwen3_8b"])
    with pytest.raises(HeadwayError, match="another model|model shape"):
        check(simulations.registry, schema.composition(cfg))
