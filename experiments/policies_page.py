"""docs/policies.md: every policy in the box, its paper, what differs, and the test that shows its property.

    python experiments/policies_page.py            writes the page
    python experiments/policies_page.py --check    exit code 1 where the page is not what it would write

Names, papers and differences come from the plugins' own docstrings and from the comments of conf/policy, so
that they are written once; the tests are named here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.cli import presets
from core.compose.hooks import Registry, load_registry
from core.policy import ROLES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "policies.md"
#: Role -> policy -> the test of its defining property, in the file that comes first.
TESTS = {
    "scheduler": (
        "test_schedulers.py",
        {
            "orca": "test_orca_never_preempts_where_prefill_first_does",
            "chunked": "test_sarathi_admits_on_the_blocks_of_the_whole_prompt",
            "running_first": "test_running_first_goes_by_admission_and_knows_no_phases",
            "prefill_first": "test_the_watermark_is_left_free_by_who_starts_beside_others",
            "fcfs": "test_fcfs_is_the_other_name_of_prefill_first",
            "pd_split": "test_pd_split_splits_the_first_prompt_of_a_step_only",
            "sglang": "test_sglang_fills_a_chunk_with_prompts_and_decodes_when_there_are_none",
            "selective": (
                "test_niyama.py::test_a_better_prompt_overtakes_one_that_is_half_done_and_nothing_is_recomputed"
            ),
            "slai": "test_slai.py::test_a_decode_that_is_not_due_leaves_its_place_to_prompts",
            "fairbatching": (
                "test_fairbatching.py::test_a_surge_of_prompts_is_served_from_the_slack_that_decodes_saved_and_no_token_is_late"
            ),
            "jitserve": (
                "test_jitserve.py::test_requests_of_similar_lengths_run_together_even_if_the_very_best_is_of_another"
            ),
            "preemptive": "test_pause.py::test_where_memory_suffices_preemption_recomputes_nothing",
        },
    ),
    "order": (
        "test_orders_keyed.py",
        {
            "fcfs": "test_orders_prefix.py::test_lpm_is_fcfs_above_its_window",
            "program_fcfs": (
                "test_program_fcfs_serves_the_next_turn_of_a_program_before_programs_that_came_later"
            ),
            "priority": "test_priority_is_smallest_first_and_then_by_arrival",
            "sjf": "test_sjf_counts_the_whole_job_and_srpt_what_is_left_of_it",
            "srpt": "test_on_a_batch_srpt_is_no_worse_than_sjf_and_sjf_no_worse_than_fcfs",
            "ltr": "test_ltr_serves_the_best_rank_first_and_promotes_who_has_waited_for_the_threshold",
            "edf": "test_edf_misses_no_deadline_where_some_order_meets_them_all",
            "least_slack": "test_least_slack_puts_the_longest_work_first_when_deadlines_are_equal",
            "random": "test_a_random_order_keeps_a_requests_place_and_depends_on_the_seed_alone",
            "niyama": "test_niyama.py::test_alpha_is_what_a_token_of_prefill_weighs",
            "jitserve": "test_jitserve.py::test_most_goodput_in_each_second_of_work_goes_first",
            "spf": "test_slai.py::test_spf_serves_the_shortest_prompt_of_the_strictest_tier_first",
            "lpm": "test_orders_prefix.py::test_lpm_offers_the_longest_cached_prefix_first",
            "k_lpm": (
                "test_orders_prefix.py::test_k_lpm_takes_the_oldest_and_then_k_minus_one_with_the_longest_prefix"
            ),
            "dfs_weight": (
                "test_orders_prefix.py::test_dfs_weight_walks_the_heaviest_subtree_first_and_keeps_groups_together"
            ),
            "hrrn": (
                "test_orders_prefix.py::test_hrrn_prefers_short_prompts_until_a_long_one_has_waited_enough"
            ),
            "vtc": (
                "test_orders_service.py::test_vtc_bounds_the_service_difference_of_backlogged_clients_and_fcfs_does_not"
            ),
            "vtc_predicted": (
                "test_vtc.py::test_with_true_lengths_clients_drift_apart_less_than_by_what_has_come"
            ),
            "dlpm": "test_orders_service.py::test_dlpm_is_more_local_than_vtc_and_fairer_than_lpm",
            "mlfq": "test_orders_service.py::test_mlfq_has_levels_without_end_unless_it_is_told",
            "atlas": "test_orders_service.py::test_atlas_charges_the_critical_path_and_plas_all_calls",
            "plas": "test_orders_service.py::test_plas_gives_a_call_the_whole_quantum_of_its_queue",
        },
    ),
    "victim": (
        "test_victims.py",
        {
            "last_admitted": "test_last_admitted_goes_by_admission_where_newest_goes_by_arrival",
            "fewest_outputs": "test_schedulers.py::test_sglang_retracts_who_has_generated_least",
            "random": "test_random_names_everybody_once_and_each_first_equally_often",
            "pause_first": "test_pause.py::test_pause_first_takes_whom_the_order_would_serve_last",
        }
        | dict.fromkeys(
            ("newest", "oldest", "lcf", "most_computed", "lowest_priority"),
            "test_the_order_in_which_victims_are_named",
        ),
    ),
    "chunk": (
        "test_chunk.py",
        {
            "fixed": "test_fixed_cuts_every_prompt_into_equal_chunks_and_leaves_decodes_alone",
            "dynamic_chunk": "test_deadlines_count_from_arrival_so_that_who_is_early_has_slack",
        },
    ),
    "admission": (
        "test_admission.py",
        {
            "always": "test_always_decides_as_no_admission_does",
            "past_future": "test_with_true_lengths_and_nothing_reserved_past_future_never_preempts",
            "peak_memory": (
                "test_peak_memory_never_preempts_and_starts_more_than_orca_whose_reservation_holds_to_the_end"
            ),
            "new_token_ratio": (
                "test_a_request_starts_when_all_it_may_need_fits_beside_half_of_what_the_others_may"
            ),
            "rpm": "test_rpm_takes_so_many_of_a_clients_requests_in_any_minute_and_rejects_the_rest",
            "early_reject": "test_early_reject_refuses_at_arrival_what_would_miss_its_ttft",
        },
    ),
    "predictor": (
        "test_predictors.py",
        {
            "oracle": "test_the_oracle_knows_hidden_lengths_caps_and_the_context",
            "noisy": "test_a_noisy_predictor_ranks_with_the_kendall_tau_it_is_given",
            "history": "test_history_counts_only_lengths_above_what_is_generated_already",
            "constant": "test_constant_is_capped_by_what_a_request_may_generate",
        },
    ),
    "cache": (
        "test_cache.py",
        {
            "none": "test_cache_indexes.py::test_nothing_is_shared_without_an_index",
            "hash": "test_a_colliding_hash_is_a_miss_not_a_wrong_hit",
            "radix": "test_an_edge_is_split_where_prompts_part_and_the_tail_keeps_its_children",
        },
    ),
    "eviction": (
        "test_evictions.py",
        {
            "mru": "test_mru_keeps_a_part_of_a_loop_that_lru_loses_whole",
            "lfu_da": "test_aging_lets_go_of_what_was_popular_once",
            "slru": "test_slru_gives_the_protected_segment_its_share_only",
            "gdsf": "test_gdsf_values_a_deep_block_above_a_shallow_one",
            "priority": "test_priority_evicts_the_least_urgent_first_and_the_oldest_among_equals",
            "tlru": "test_tlru_cuts_as_much_as_the_next_prefill_can_compute_and_no_more",
            "workload_aware": "test_workload_aware_keeps_the_category_that_comes_back",
            "belady": "test_belady_is_the_optimum_by_brute_force",
        }
        | dict.fromkeys(
            ("lru", "fifo", "lfu", "two_q", "arc", "s3fifo", "sieve"),
            "test_agrees_with_libcachesim_hit_for_hit",
        ),
    ),
    "retention": (
        "test_retention.py",
        {
            "keep": "test_keep_is_what_happens_without_a_policy",
            "drop": "test_drop_leaves_nothing_for_the_next_request",
            "ttl": "test_the_time_is_where_the_benefit_less_the_wait_peaks",
        },
    ),
}
HEAD = """# Policies

Written by `python experiments/policies_page.py` from the plugins and presets themselves; a test compares.
Each policy passes the conformance kit (`python -m headway check order=vtc`, `check policy=vtc`), and the test
that is named shows the property that its paper defines it by. "Differs" is what the paper or its authors'
code has and the policy has not, or has otherwise.
"""


def test_of(role: str, name: str) -> str:
    """file::test. Raises KeyError for a policy whose property no test shows."""
    file, tests = TESTS[role]
    test = tests[name]
    return test if "::" in test else f"{file}::{test}"


def rows(registry: Registry) -> Iterator[str]:
    for role in TESTS:
        yield f"\n## {role}: {ROLES[role]}\n"
        yield "| policy | what it is, and where from | differs | shown by |"
        yield "|---|---|---|---|"
        for name in registry.names(role):
            plugin = registry.plugins[role, name]
            if not plugin.origin.dist:
                said, shown = _cell(plugin.differs), test_of(role, name)
                yield f"| `{name}` | {_cell(plugin.summary)} | {said} | `{shown}` |"


def preset_rows() -> Iterator[str]:
    yield "\n## policy: presets, which set every role that a paper's policy fills\n"
    yield (
        "Each is checked by `test_presets.py::test_every_preset_passes_the_conformance_kit`, or, where it is "
        "a single policy, as that.\n"
    )
    yield "| preset | what it is | chooses |"
    yield "|---|---|---|"
    for name in presets.names():
        words = " ".join(f"`{word}`" for word in presets.words(name))
        yield f"| `{name}` | {_cell(presets.about(name))} | {words} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def page() -> str:
    return "\n".join([HEAD.rstrip("\n"), *preset_rows(), *rows(load_registry())]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
