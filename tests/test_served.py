"""The file of `vllm bench serve`: its requests, the steps of its server, a clock fitted to them, and what
other policies would have made of it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from core.cli import main as cli
from core.cli import schema
from core.compose.build import build
from core.compose.hooks import load_registry
from core.errors import ConfigError
from core.measure.metrics import summarize
from core.measure.served import SEEN, read_served, seen, served_requests, served_steps
from plugins.executors.step_fit import profile_of_served

BUDGET = 512


def document(*requests: tuple[float, int, list[float]], **changes) -> dict:
    """The file about requests that were (sent, length of the prompt, times of the tokens)."""
    gaps = [[b - a for a, b in zip(times, times[1:], strict=False)] for _, _, times in requests]
    return {
        "request_throughput": 1.0,
        "total_input_tokens": sum(length for _, length, _ in requests),
        "start_times": [sent for sent, _, _ in requests],
        "input_lens": [length for _, length, _ in requests],
        "output_lens": [len(times) for _, _, times in requests],
        "ttfts": [times[0] - sent for sent, _, times in requests],
        "itls": gaps,
        "errors": [""] * len(requests),
    } | changes


def steps(*requests: tuple[float, int, list[float]], budget: int = BUDGET):
    found = served_steps(served_requests(document(*requests)), budget)
    return [(list(starts), list(lengths), round(seconds, 6)) for starts, lengths, seconds in found]


def test_pieces_that_come_together_are_of_one_step_and_say_what_it_held() -> None:
    """B's prompt of 4 is computed beside A's third token; C comes when nobody is there."""
    a = (10.0, 6, [11.0, 12.0, 13.0, 14.0])
    b = (11.5, 4, [13.01, 14.01])
    c = (20.0, 3, [20.5, 21.0])
    assert steps(a, b, c) == [
        ([0], [6], 1.0),
        ([6], [1], 1.0),
        ([7, 0], [1, 4], 1.0),
        ([8, 4], [1, 1], 1.0),
        ([0], [3], 0.5),
        ([3], [1], 0.5),
    ]


def test_a_long_prompt_is_spread_over_the_steps_before_its_first_token_that_began_after_it_came() -> None:
    """At most 4 tokens a step, one of which is A's: what is left of the prompt is 1, 3 and 3 tokens."""
    a = (0.0, 2, [1.0, 2.0, 3.0, 4.0, 5.0])
    b = (1.5, 7, [5.0])
    assert [(starts, lengths) for starts, lengths, _ in steps(a, b, budget=4)] == [
        ([0], [2]),
        ([2], [1]),
        ([3, 0], [1, 1]),
        ([4, 1], [1, 3]),
        ([5, 4], [1, 3]),
    ]


def test_a_request_has_no_two_pieces_in_one_step_however_close_they_come() -> None:
    assert len(steps((0.0, 1, [1.0, 1.0, 1.0, 9.0, 17.0]))) == 3  # steps of no time at all are none


SERVER = [
    "model=qwen3_0_6b",
    "hardware=h100",
    "scheduler=chunked",
    "cache=none",
    f"engine.max_num_batched_tokens={BUDGET}",
    "engine.num_blocks=4000",
]
LOAD = [
    "workload=random",
    "workload.num_requests=150",
    "workload.arrival=poisson",
    "workload.rate=400",
    "workload.input_len=[20,1500]",
    "workload.output_len=[4,80]",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> tuple[Path, dict]:
    """What clients of a simulated server wrote, each piece of an answer up to 0.2 ms late; and the server's
    own summary."""
    registry = load_registry()
    schema.register(registry)
    words = [*SERVER, *LOAD, "executor=sim", "executor.profile=none", "tracking=none"]
    result = build(registry, schema.composition(schema.composed(words))).execute()
    rng, path = Random(1), tmp_path_factory.mktemp("served") / "bench.json"
    rows = [
        (o.arrival_time + 5.0, o.num_prompt_tokens, [t + 5.0 + rng.uniform(0, 2e-4) for t in o.token_times])
        for o in result.outputs
    ]
    path.write_text(json.dumps(document(*rows)) + "\n")
    return path, summarize(result)


def test_clients_see_what_the_server_says_of_itself(server) -> None:
    path, summary = server
    figures = seen(read_served(path, "x"))
    assert {name: figures[name] for name in SEEN} == pytest.approx({n: summary[n] for n in SEEN}, rel=0.05)


def test_the_clock_of_a_server_is_found_from_what_its_clients_saw(server, capsys) -> None:
    """Within 2% of its means, and as it was ranked: shortest first helps, another name for the same does
    not."""
    path, summary = server
    asked = ["order=fcfs,sjf", "predictor=oracle", "--server", *SERVER]
    code = cli.main(["whatif", str(path), *asked, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out)
    rows = {row["metric"]: row for row in found["metrics"]}
    for metric in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput"):
        assert rows[metric]["as_it_was"] == pytest.approx(summary[metric], rel=0.02), metric
    fcfs, sjf = rows["mean_ttft_ms"]["changes"]
    assert fcfs["change"] == 0 and sjf["verdict"] == "better"
    assert "had cached" in found["note"]


def test_a_trace_of_it_replays_its_arrivals_and_lengths(server, capsys) -> None:
    assert cli.main(["trace", str(server[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "vllm_bench" and found["requests"] == 150


# ---- what is refused -------------------------------------------------------------------------------------

GOOD = (0.0, 5, [1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itls": None}, r"lacks itls: .*--save-detailed"),
        ({"ttfts": [1.0, 2.0]}, "different lengths"),
        ({"ttfts": [-1.0]}, "request 0 is .*expected a start"),
        ({"itls": [[float("nan")]]}, "request 0 is"),
        ({"input_lens": [0]}, "request 0 is"),
        ({"output_lens": [1]}, "2 pieces of an answer of 1 tokens"),
        ({"errors": ["refused"]}, "none of its requests was answered"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_with_the_request(changes, message, tmp_path) -> None:
    made = {name: value for name, value in document(GOOD, **changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        served_requests(made)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(made))
    with pytest.raises(ConfigError, match=f"executor.profile=.*{message}"):
        profile_of_served(path, BUDGET)


def test_requests_that_failed_are_left_out() -> None:
    made = document(GOOD, (1.0, 7, [1.5]), errors=["", "timeout"])
    assert [r.input_len for r in served_requests(made)] == [5]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["order=sjf"], "what served it"),
        (["victim=oldest", "--server", *SERVER[:-1], "engine.num_blocks=20"], "cannot run in such a server"),
        (["order=sjf", "--server", "model=qwen3_0_6b", "nothing=1"], "nothing"),
        (["workload.rate=3", "--server", *SERVER], "expected POLICY=NAME"),
    ],
)
def test_whatif_says_what_is_missing_about_the_server(server, capsys, argv, message) -> None:
    assert cli.main(["whatif", str(server[0]), *argv]) != 0
    assert message in capsys.readouterr().err


def test_a_run_of_ours_has_no_server(tmp_path, capsys) -> None:
    assert cli.main(["whatif", str(tmp_path), "order=sjf", "--server", "model=tiny"]) != 0
    assert "--server is about" in capsys.readouterr().err


def test_too_few_steps_are_refused(tmp_path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document(GOOD)))
    with pytest.raises(ConfigError, match="2 steps are too few"):
        profile_of_served(path, BUDGET)
