"""Orders that look at the prefix cache, and the ageing that keeps them from starving anybody."""

from __future__ import annotations

from random import Random

import pytest
from helpers.policy_runs import ask, compose, finishing, run

from core.compose.config import EngineConfig

CONFIG = EngineConfig(block_size=8, num_blocks=64, max_num_seqs=4, max_num_batched_tokens=256)


def grouped(seed: int, groups: int = 8, each: int = 6) -> list:
    """Requests that share one of a few prefixes of 64 tokens, shuffled; the pool holds about half of the
    prefixes."""
    rng = Random(seed)
    asked = []
    for group in range(groups):
        asked += [
            ask(0.0, [[g] * 64 for g in (group + 2,)][0] + [rng.randrange(100, 9000) for _ in range(8)], 6)
            for _ in range(each)
        ]
    rng.shuffle(asked)
    return asked


def hits(asked: list, order) -> int:
    return sum(o.num_cached_tokens for o in run(asked, order=order, cache="radix", engine=CONFIG).outputs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", ["lpm", "dfs_weight"])
def test_hit_rate_on_grouped_prefixes_is_at_least_that_of_fcfs(order, seed):
    asked = grouped(seed)
    assert hits(asked, order) >= hits(asked, "fcfs")


def test_lpm_and_dfs_weight_hit_much_more_where_prefixes_do_not_fit_together():
    total = {
        order: sum(hits(grouped(seed), order) for seed in range(6)) for order in ("fcfs", "lpm", "dfs_weight")
    }
    assert total["lpm"] > 1.2 * total["fcfs"] and total["dfs_weight"] > 1.2 * total["fcfs"]


def warmed(order, later: list, **parameters):
    """An engine whose cache holds a prefix of 64 twos, with `later` waiting."""
    engine = compose(order=(order, parameters), cache="radix", engine=CONFIG)
    engine.add(ask(0.0, [2] * 64 + [3], 1))
    while engine.step():
        pass
    for a in later:
        engine.add(a)
    engine._ingest(100.0)
    engine.view.begin_step(engine.counts.num_steps, 100.0, 0)
    return engine


def ids(engine) -> list[str]:
    return [r.id for r in engine.roles["order"].order(engine.view)]


def test_lpm_offers_the_longest_cached_prefix_first():
    later = [
        ask(1.0, [9] * 8, 1, "none"),
        ask(1.0, [2] * 40, 1, "part"),
        ask(1.0, [2] * 72, 1, "whole"),
        ask(1.0, [8] * 8, 1, "none2"),
    ]
    assert ids(warmed("lpm", later)) == ["whole", "part", "none", "none2"]


def test_lpm_is_fcfs_above_its_window():
    later = [ask(1.0, [9] * 8, 1, "none"), ask(1.0, [2] * 72, 1, "whole")]
    assert ids(warmed("lpm", later, fcfs_above=1)) == ["none", "whole"]
    assert ids(warmed("lpm", later, fcfs_above=2)) == ["whole", "none"]


@pytest.mark.parametrize("order", ["lpm", "hrrn"])
def test_of_requests_that_share_an_uncached_prefix_one_goes_and_the_others_wait_for_it(order):
    later = [ask(1.0, [7] * 40 + [i], 1, f"same{i}") for i in (10, 11, 12)] + [ask(1.0, [5] * 50, 1, "other")]
    offered = ids(warmed(order, later))
    assert offered[2:] == ["same11", "same12"] and set(offered[:2]) == {"same10", "other"}
    salted = [ask(1.0, [7] * 40, 1, f"salt{i}", salt=str(i)) for i in range(3)]
    assert ids(warmed(order, salted)) == ["salt0", "salt1", "salt2"]  # other salts share nothing


def test_k_lpm_takes_the_oldest_and_then_k_minus_one_with_the_longest_prefix():
    """ "hot" requests hit what "first" has cached, "cold" ones hit nothing and are older."""
    head = list(range(2, 66))
    asked = [ask(0.0, [*head, 1], 2, "first")]
    asked += [ask(0.5, [1000 + i] * 64, 1, f"cold{i}") for i in range(3)]
    asked += [ask(0.5, [*head, 100 + i], 1, f"hot{i}") for i in range(4)]
    config = EngineConfig(block_size=8, num_blocks=256, max_num_seqs=1, max_num_batched_tokens=256)

    def order(k: int) -> list[str]:
        return finishing(run(asked, order=("k_lpm", {"k": k}), cache="radix", engine=config))[1:]

    cold, hot = [f"cold{i}" for i in range(3)], [f"hot{i}" for i in range(4)]
    assert order(1) == [*cold, *hot]
    assert order(1000) == [*hot, *cold]
    # "first" was the oldest once; of every three that start one is.
    assert order(3) == ["hot0", "hot1", "cold0", "hot2", "hot3", "cold1", "cold2"]


def test_dfs_weight_walks_the_heaviest_subtree_first_and_keeps_groups_together():
    engine = compose(order="dfs_weight", cache="radix", engine=CONFIG)
    for i, head in enumerate(([2] * 32, [2] * 16 + [4] * 16, [3] * 32)):
        engine.add(ask(0.0, [*head, 9], 1, f"warm{i}"))
    while engine.step():
        pass
    later = [
        ("c", [3] * 33),
        ("a1", [2] * 33),
        ("root", [6] * 9),
        ("b", [2] * 16 + [4] * 17),
        ("a2", [2] * 40),
        ("stem", [2] * 17),
    ]
    for id, prompt in later:
        engine.add(ask(1.0, prompt, 1, id))
    engine._ingest(100.0)
    engine.view.begin_step(engine.counts.num_steps, 100.0, 0)
    # Below the root: the twos (4 requests) before the threes (1); below the twos: a (2) before b (1), then
    # the stem itself.
    assert ids(engine) == ["a1", "a2", "b", "stem", "c", "root"]


def test_hrrn_prefers_short_prompts_until_a_long_one_has_waited_enough():
    asked = [
        ask(0.0, 20, 1, "first"),
        ask(0.0, 120, 1, "long"),
        *(ask(0.009 * i, 20, 1, f"s{i}") for i in range(60)),
    ]
    place = finishing(run(asked, order="hrrn")).index("long")
    assert 3 < place < 20  # overtaken by some short ones, not by all
    assert finishing(run(asked)).index("long") == 1


def test_hrrn_counts_a_cached_prefix_as_no_work():
    later = [ask(1.0, [9] * 24, 1, "shorter"), ask(1.0, [2] * 72, 1, "cached")]
    engine = warmed("hrrn", later)
    engine.roles["order"]._processed += 1000  # the engine computed prompts of others while these waited
    assert ids(engine) == ["cached", "shorter"]
