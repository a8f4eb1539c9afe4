"""What is left open suits the device: tokens of a step, steps in flight. And what an executor prepares is
told apart from what it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import hydra
import pytest
from helpers.torch_engines import engine_of
from hydra import initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from core.cli import schema
from core.compose.build import Composition, build
from core.compose.defaults import default_choices
from core.compose.hooks import load_registry
from core.measure import report
from core.measure.metrics import summarize
from core.testing import kit
from headway import (
    Arrival,
    ConfigError,
    EngineConfig,
    Hardware,
    ModelConfig,
    ParallelConfig,
    Preparation,
    SamplingParams,
)
from plugins.executors.cost import default_token_budget
from plugins.executors.replay import ReplayError
from plugins.executors.sim import SimExecutor
from plugins.executors.torch import TorchExecutor
from plugins.executors.torch.warmup import PREPARATIONS
from plugins.kernels.torch import TorchKernels

CONF = Path(__file__).resolve().parent.parent / "conf"
SHAPE = kit.SHAPE.shape()
H100 = Hardware(name="h100", memory_bandwidth=3.35e12)
CHOICES = {
    **default_choices(),
    "executor": ("sim", {}),
    "workload": ("random", {"num_requests": 12, "input_len": [5, 40], "output_len": 6}),
}


def composition(*overrides: str) -> Composition:
    schema.register(load_registry())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return schema.composition(hydra.compose("config", list(overrides)))


def run_of(
    engine: EngineConfig | None = None, *, directory=None, parallel: ParallelConfig | None = None, **choices
):
    roles = {**CHOICES, **choices}
    given = {"parallel": parallel or ParallelConfig(), "model": kit.SHAPE}
    return build(load_registry(), Composition(roles, engine or EngineConfig(), **given), directory=directory)


# ---- tokens of a step ------------------------------------------------------------------------------------


def test_ranks_that_share_a_step_get_a_longer_one() -> None:
    card = composition("hardware=h100").hardware
    assert default_token_budget(SHAPE, card, tp=4) == 4 * default_token_budget(SHAPE, card)


@pytest.mark.parametrize(
    ("card", "dtype", "budget"),
    [
        ("h100", "bfloat16", 2048),
        ("h200", "bfloat16", 2048),
        ("a100", "bfloat16", 2048),
        ("rtx4090", "float16", 2048),
        ("h200", "float32", 4096),
    ],
)
def test_the_default_token_budget_follows_from_the_card(card: str, dtype: str, budget: int) -> None:
    assert (
        default_token_budget(replace(SHAPE, dtype=dtype), composition(f"hardware={card}").hardware) == budget
    )


@given(st.floats(1e12, 1e16), st.floats(1e11, 1e14), st.floats(0.1, 1), st.floats(0.1, 1))
def test_the_default_token_budget_is_8_to_16_ridges_and_a_power_of_two(
    flops: float, bandwidth: float, part: float, share: float
) -> None:
    card = Hardware(
        peak_flops=flops, memory_bandwidth=bandwidth, flops_fraction=part, bandwidth_fraction=share
    )
    budget, ridge = (
        default_token_budget(replace(SHAPE, dtype="bfloat16"), card),
        flops * part / (bandwidth * share),
    )
    assert budget.bit_count() == 1 and budget >= 8 * ridge * (1 - 1e-9)
    assert budget < 16 * ridge or budget == 1


def gpu_executor(
    monkeypatch: pytest.MonkeyPatch, card: Hardware, parallel: ParallelConfig | None = None
) -> TorchExecutor:
    """The real executor, prepared as if its device were a GPU."""
    from plugins.executors.torch import execution
    from plugins.models.spec import read_model

    class OnGpu(execution.Execution):
        def __init__(self, config, model, *_, **__):
            self.device, self.spec = SimpleNamespace(type="cuda"), read_model(model)

    from plugins.parallel import execution as parallel_execution  # before its base class is another

    monkeypatch.setattr(execution, "Execution", OnGpu)
    monkeypatch.setattr(parallel_execution, "drive", lambda job, backends: OnGpu(None, job.model))
    executor = TorchExecutor(device="cpu")
    executor.prepare(ModelConfig(), hardware=card, parallel=parallel)
    return executor


def test_a_gpu_and_its_simulation_get_the_same_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    real, simulated = gpu_executor(monkeypatch, H100), SimExecutor()
    simulated.prepare(real.caps.model, H100)
    assert (
        real.caps.default_token_budget
        == simulated.caps.default_token_budget
        == default_token_budget(real.caps.model, H100)
    )


def test_a_cpu_keeps_the_papers_512_tokens() -> None:
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(), TorchKernels(), hardware=H100)
    assert (executor.caps.default_token_budget, executor.caps.default_inflight) == (512, 1)


@pytest.mark.parametrize("scheduler", ["chunked", "preemptive"])
@pytest.mark.parametrize(
    ("given", "most", "used"), [(None, 8192, 2048), (None, 300, 300), (99, 8192, 99), (5000, 8192, 5000)]
)
def test_a_budget_left_open_is_the_devices_within_the_engines_limit_and_one_that_is_given_is_used(
    scheduler, given, most, used
) -> None:
    run = run_of(
        EngineConfig(max_num_batched_tokens=most),
        scheduler=(scheduler, {"token_budget": given}),
        order=("sjf", {}),
        predictor=("oracle", {}),
    )
    assert run.engine.executor.caps.default_token_budget == 2048
    assert run.engine.roles.scheduler.token_budget == used
    assert f"token_budget={used}" in report.composed(run)


def test_sarathis_preset_keeps_the_papers_budget_and_others_do_not() -> None:
    assert composition("policy=sarathi").choices["scheduler"][1]["token_budget"] == 512
    assert (
        composition("policy=sarathi", "scheduler.token_budget=2048").choices["scheduler"][1]["token_budget"]
        == 2048
    )
    assert composition("policy=dlpm").choices["scheduler"][1]["token_budget"] is None


# ---- steps in flight -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pp", "given", "used"), [(1, None, 1), (1, 2, 2), (3, None, 3), (3, 1, 3), (3, 4, 4)]
)
def test_steps_in_flight_of_a_simulation(pp: int, given: int | None, used: int) -> None:
    model = replace(kit.SHAPE, num_hidden_layers=6)
    run = build(
        load_registry(),
        Composition(CHOICES, EngineConfig(max_inflight=given), model, parallel=ParallelConfig(pp=pp)),
    )
    assert run.engine.max_inflight == used
    assert f"max_inflight={used}" in report.composed(run)


def test_no_step_in_flight_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine.max_inflight=0: expected at least 1"):
        EngineConfig(max_inflight=0)


@pytest.mark.parametrize(("pp", "used"), [(1, 2), (2, 2), (3, 3)])
def test_steps_in_flight_that_suit_a_gpu(monkeypatch: pytest.MonkeyPatch, pp: int, used: int) -> None:
    assert gpu_executor(monkeypatch, H100, ParallelConfig(pp=pp)).caps.default_inflight == used


# ---- what became of it is stored -------------------------------------------------------------------------


def test_a_summary_holds_what_was_derived_and_nothing_that_was_given() -> None:
    derived = summarize(run_of(EngineConfig(num_blocks=99)).execute())["derived"]
    assert derived == {
        "scheduler.token_budget": 2048,
        "engine.max_inflight": 1,
        "engine.max_model_len": SHAPE.max_position_embeddings,
    }
    everything = EngineConfig(num_blocks=99, max_inflight=1, max_model_len=100)
    assert "derived" not in summarize(
        run_of(everything, scheduler=("chunked", {"token_budget": 8})).execute()
    )


def test_a_replay_derives_what_its_record_did(tmp_path: Path) -> None:
    original = run_of(directory=tmp_path).execute()
    choice = ("replay", {"path": str(tmp_path)})
    again = run_of(executor=choice).execute()
    assert (again.decision_hash, again.derived["scheduler.token_budget"]) == (original.decision_hash, 2048)
    same = EngineConfig(max_inflight=original.derived["engine.max_inflight"])
    assert (
        run_of(same, executor=choice, scheduler=("chunked", {"token_budget": 2048})).execute().decision_hash
        == original.decision_hash
    )


def test_what_was_given_to_a_record_is_given_to_its_replay(tmp_path: Path) -> None:
    run_of(
        EngineConfig(max_inflight=2), directory=tmp_path, scheduler=("chunked", {"token_budget": 2048})
    ).execute()
    with pytest.raises(
        ReplayError,
        match=r"engine.max_inflight=null, recorded with 2\n  scheduler.token_budget=null, recorded with 2048",
    ):
        run_of(executor=("replay", {"path": str(tmp_path)}))


# ---- preparations ----------------------------------------------------------------------------------------


@dataclass
class Compiling(SimExecutor):
    """Says that it compiled for a second and a half, and again in its third step."""

    made: ClassVar[int] = 7

    @property
    def preparation(self) -> Preparation:
        return Preparation(1.5, self.made)

    def launch(self, plan):
        self.made += plan.step == 2
        return super().launch(plan)


def test_a_late_compilation_is_reported_and_the_warm_up_stands_apart() -> None:
    registry = load_registry()
    registry.add("executor", "compiling", Compiling)
    roles = {**CHOICES, "executor": ("compiling", {})}
    summary = summarize(build(registry, Composition(roles, model=kit.SHAPE)).execute())
    assert (summary["warmup_seconds"], summary["late_preparations"]) == (1.5, 1)
    table = report.run_table(summary)
    assert (
        "1.50 s before the first request" in table
        and "warning      1 kernels compiled or graphs captured after" in table
    )


def test_a_run_without_preparations_reports_none() -> None:
    summary = summarize(run_of().execute())
    assert (summary["warmup_seconds"], summary["late_preparations"]) == (0, 0)
    assert "warm-up" not in report.run_table(summary) and "warning" not in report.run_table(summary)


def test_the_real_executor_counts_what_is_captured_while_it_runs_in_the_run_that_it_happened_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(), TorchKernels())
    engine = engine_of(executor)
    execute, late = executor.execution.runner.execute, [True, False, True]
    monkeypatch.setattr(
        executor.execution.runner,
        "execute",
        lambda step: (late and late.pop() and PREPARATIONS.captured(), execute(step))[1],
    )
    ask = [Arrival(0.0, [1, 2, 3], SamplingParams(max_tokens=5))]
    counts = [engine.run(ask).late_preparations for _ in range(2)]
    assert counts == [2, 0]
