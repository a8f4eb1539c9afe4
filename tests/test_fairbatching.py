"""FairBatching: a step lasts as long as the decodes' slack, and who is ahead makes room for prompts."""

from __future__ import annotations

from typing import Any

from helpers.policy_runs import Server, Steps, ask, run

from core.compose.config import EngineConfig
from core.inputs import SLO, Arrival
from core.outputs import RunResult
from core.outside import StepRecord

ROOMY = EngineConfig(block_size=16, num_blocks=2048, max_num_seqs=16, max_num_batched_tokens=8192, check=True)
TPOT = 0.05


def slow() -> Server:
    """20 ms, and 0.1 ms for each token: 300 tokens in 50 ms."""
    return Server(overhead=0.02, per_token=0.0001, max_inflight=1)


def served(
    asked: list[Arrival], scheduler: str = "fairbatching", **given: Any
) -> tuple[list[StepRecord], RunResult]:
    steps = Steps()
    given = {"token_budget": 8192} | given
    result = run(asked, scheduler=(scheduler, given), server=slow(), engine=ROOMY, observers=[steps])
    return steps.records, result


def tokens(record: StepRecord) -> dict[str, int]:
    return {q.id: n for q, n in zip(record.plan.requests, record.plan.lengths, strict=True)}


def late(result: RunResult) -> set[str]:
    """Requests of which a token came after arrival + ttft + j tpot."""
    return {
        o.id
        for o in result.outputs
        for j, time in enumerate(o.token_times)
        if time > o.arrival_time + (o.slo.ttft or 0.0) + j * TPOT + 1e-9
    }


def ahead(count: int = 8) -> list[Arrival]:
    """Decodes that get a token in every 21 ms, of which 50 ms would do."""
    return [ask(0.0, 16, 150, f"d{i}", SLO(ttft=0.1, tpot=TPOT)) for i in range(count)]


def prompts(count: int, length: int, ttft: float) -> list[Arrival]:
    return [ask(1.0, length, 1, f"p{i}", SLO(ttft=ttft, tpot=TPOT)) for i in range(count)]


def test_a_surge_of_prompts_is_served_from_the_slack_that_decodes_saved_and_no_token_is_late():
    """4,200 tokens take 0.44 s in one step, and 0.74 s where no two tokens of a decode are more than 50 ms
    apart."""
    asked = ahead() + prompts(6, 700, ttft=0.5)
    records, result = served(asked)
    assert late(result) == set()
    assert {f"p{i}": 700 for i in range(6)}.items() <= max(map(tokens, records), key=len).items()
    _, stall_free = served(asked, "chunked", token_budget=300)
    assert late(stall_free) == {"p3", "p4", "p5"}


def test_a_step_lasts_no_longer_than_the_least_slack_and_no_shorter_than_the_smallest_tpot():
    """ "young" has saved up less than a prompt of 6,000 tokens takes, and "behind" is late from the start."""
    prompt = prompts(1, 6000, ttft=9.0)
    young = ask(0.985, 16, 40, "young", SLO(ttft=0.2, tpot=TPOT))
    records, result = served([*ahead(1), young, *prompt])
    lasts = [record.end - record.start for record in records if "p0" in tokens(record)]
    assert late(result) == set() and lasts[0] > 4 * TPOT
    assert len(lasts) > 10 and all(abs(last - TPOT) < 0.001 for last in lasts[1:-1])
    behind = ask(0.985, 16, 200, "behind", SLO(ttft=0.001, tpot=TPOT / 2))
    records, _ = served([behind, *prompt], floor=1)
    chunks = [tokens(record)["p0"] for record in records if "p0" in tokens(record)]
    assert len(chunks) > 100 and set(chunks[:-1]) <= {49, 50}  # 5 ms beside the overhead


def test_decodes_that_are_ahead_of_the_urgent_one_come_behind_prompts():
    """What time prompts leave is theirs."""
    young = ask(0.985, 16, 60, "young", SLO(ttft=0.05, tpot=TPOT))
    records, result = served([*ahead(), young, *prompts(1, 3000, ttft=9.0)])
    assert late(result) == set()
    during = [set(tokens(record)) for record in records if "p0" in tokens(record)]
    assert len(during) > 5 and all(step == {"young", "p0"} for step in during[:-1])
    behind = [set(tokens(record)) for record in records if record.start > 1.5 and "young" in tokens(record)]
    assert len(behind) > 5 and all("d7" in step for step in behind)


def test_of_urgent_decodes_those_with_the_least_slack_go_first_where_not_all_fit():
    """10 ms between tokens are less than a step's overhead, so the floor is what a step holds."""
    ttft = {"a": 0.03, "b": 0.01, "c": 0.02}
    records, _ = served([ask(0.0, 1, 20, id, SLO(ttft=ttft[id], tpot=0.01)) for id in ttft], floor=2)
    come = dict.fromkeys(ttft, 1)
    for record in records[1:20]:
        left_out = (ttft.keys() - tokens(record)).pop()
        assert len(tokens(record)) == 2
        assert ttft[left_out] + 0.01 * come[left_out] >= max(ttft[q] + 0.01 * come[q] for q in tokens(record))
        for id in tokens(record):
            come[id] += 1


def test_a_request_without_targets_is_due_by_the_one_that_stands_in_from_its_first_token_on():
    young = ask(0.985, 16, 60, "young", SLO(ttft=0.05, tpot=TPOT))
    asked = [ask(0.0, 16, 80, "none"), young, *prompts(1, 3000, ttft=9.0)]
    for stands_in, joins in ((0.2, False), (0.021, True)):
        records, _ = served(asked, time_between_tokens=stands_in)
        during = [set(tokens(record)) for record in records if "p0" in tokens(record)]
        assert len(during) > 5 and all(("none" in step) == joins for step in during[1:-1])
