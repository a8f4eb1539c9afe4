"""`executor=sim executor.like=RUN`: what the simulator takes from a recorded run, what it refuses and what it
says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.compose.build import Composition, build, check
from core.compose.config import EngineConfig, Hardware, ModelConfig, ParallelConfig
from core.compose.defaults import default_choices
from core.compose.hooks import load_registry
from core.errors import ConfigError, HeadwayError

SHAPE = {
    "name_or_path": "made",
    "load_format": "dummy",
    "architecture": "LlamaForCausalLM",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
WORKLOAD = ("random", {"num_requests": 12, "input_len": [20, 90], "output_len": [2, 20]})


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def composed(engine: EngineConfig | None = None, sim: dict | None = None, **more) -> Composition:
    model = ModelConfig(**SHAPE | more.pop("model", {}))
    roles = {"executor": ("sim", sim or {}), "workload": WORKLOAD} | more.pop("roles", {})
    return Composition(default_choices(**roles), engine or EngineConfig(), model, **more)


@pytest.fixture(scope="module")
def recorded(registry, tmp_path_factory) -> Path:
    """A run with limits that nobody has by default."""
    folder = tmp_path_factory.mktemp("recorded")
    engine = EngineConfig(
        block_size=8,
        num_blocks=40,
        max_num_seqs=5,
        max_num_batched_tokens=64,
        max_inflight=2,
        max_model_len=200,
    )
    roles = {"scheduler": ("chunked", {"token_budget": 48})}
    build(registry, composed(engine, roles=roles), directory=folder).execute()
    return folder


def test_a_simulation_takes_the_limits_of_the_recorded_run_and_so_its_decisions(
    registry, recorded, capsys, tmp_path
):
    run = build(registry, composed(sim={"like": str(recorded)}), directory=tmp_path)
    engine = run.engine
    assert (engine.pool.num_blocks, engine.pool.block_size, engine.max_inflight, engine.max_model_len) == (
        40,
        8,
        2,
        200,
    )
    assert (engine.config.max_num_seqs, engine.config.max_num_batched_tokens) == (5, 64)
    assert engine.derived["scheduler.token_budget"] == 48, "the recorded one was given, this one follows it"
    result = run.execute()
    assert f'"decision_hash": "{result.decision_hash}"' in str(np.load(recorded / "replay.npz")["meta"])
    told = capsys.readouterr().out
    assert "num_blocks=40 block_size=8" in told and "token_budget=48" in told and "differs" not in told


def test_what_may_differ_is_said(registry, recorded, capsys, tmp_path):
    roles = {"order": ("sjf", {}), "predictor": ("oracle", {})}
    build(registry, composed(sim={"like": str(recorded)}, roles=roles, seed=3), directory=tmp_path).execute()
    told = capsys.readouterr().out
    assert 'differs: order="sjf", recorded with "fcfs"' in told and "differs: seed=3, recorded with 0" in told


@pytest.mark.parametrize(
    "given, problem",
    [
        ({"engine": EngineConfig(block_size=32)}, r"engine\.block_size=32, but executor\.like=.* ran with 8"),
        ({"engine": EngineConfig(num_blocks=41)}, r"engine\.num_blocks=41, .* ran with 40"),
        ({"engine": EngineConfig(max_inflight=1)}, r"engine\.max_inflight=1, .* ran with 2"),
        ({"model": {"num_hidden_layers": 4}}, r"model\.num_hidden_layers=4, recorded with 2"),
        ({"model": {"vocab_size": 99}}, r"model\.vocab_size=99, recorded with 100"),
        ({"parallel": ParallelConfig(tp=2)}, r"parallel\.tp=2, recorded with 1"),
    ],
)
def test_what_must_not_differ_is_refused_before_anything_runs(registry, recorded, given, problem):
    with pytest.raises(ConfigError, match=problem):
        check(registry, composed(given.pop("engine", None), sim={"like": str(recorded)}, **given))


def test_another_card_is_a_matter_of_time(registry, recorded):
    check(registry, composed(sim={"like": str(recorded)}, hardware=Hardware(name="other", peak_flops=1e14)))


def test_what_is_no_record_of_this_version_is_refused(registry, recorded, tmp_path):
    with pytest.raises(HeadwayError, match=r"executor\.like='.*': expected a run directory with replay\.npz"):
        check(registry, composed(sim={"like": str(tmp_path)}))
    kept = dict(np.load(recorded / "replay.npz"))
    for before, after, problem in (
        ('"format": 4', '"format": 3', "format 3, expected 4: record the run again"),
        ('"tokens_per_step": 1', '"tokens_per_step": 2', "gave several tokens per step"),
    ):
        meta = str(kept["meta"])
        assert before in meta
        np.savez(tmp_path / "replay.npz", **kept | {"meta": np.array(meta.replace(before, after))})
        with pytest.raises(HeadwayError, match=problem):
            check(registry, composed(sim={"like": str(tmp_path)}))
