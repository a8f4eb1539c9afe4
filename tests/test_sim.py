"""The simulated executor: step times follow the documented roofline, capacity follows from memory, tokens
from (seed, id, position)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.roles import default_roles

from core.compose.config import GIB, EngineConfig, Hardware, ModelConfig, ModelShape
from core.engine import Engine
from core.errors import ConfigError
from core.inputs import Arrival, SamplingParams
from core.measure.metrics import summarize
from core.testing import kit
from experiments import sim_error
from headway import Scheduler
from plugins.executors.cost import Roofline
from plugins.executors.sim import SimExecutor
from plugins.schedulers.prefill_first import PrefillFirst
from plugins.workloads.nano_bench import NanoBench

CONF = Path(__file__).parent.parent / "conf"
# Round numbers: 1 byte/s and 1 FLOP/s are the unit, so that times are counts.
UNIT = Hardware("unit", 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0)
SHAPE = ModelShape("LlamaForCausalLM", 64, 4, 8, 4, 8, 128, 100, True, 512)


def shape_of(name: str) -> ModelShape:
    return ModelConfig(**yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())).shape()


def hardware_of(name: str) -> Hardware:
    return Hardware(**yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text()))


def build(executor: SimExecutor, seed: int = 0, scheduler: Scheduler | None = None, **config) -> Engine:
    roles = {"executor": executor} if scheduler is None else {"executor": executor, "scheduler": scheduler}
    return Engine(default_roles(**roles), EngineConfig(**config), seed=seed)


def prepared(
    shape: ModelShape = SHAPE,
    hardware: Hardware | None = None,
    tp: int = 1,
    pp: int = 1,
    eos=frozenset(),
    **parameters,
) -> SimExecutor:
    executor = SimExecutor(**parameters)
    executor.prepare(shape, hardware or Hardware(), tp, pp, eos)
    return executor


# ---- shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",
    # The published sizes: what `sum(p.numel() for p in model.parameters())` says of the real checkpoints.
    [
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_8b", 8_190_735_360),
        ("llama_3_1_8b", 8_030_261_248),
        ("smollm2", 134_515_008),
        ("llama_2_70b", 68_976_648_192),
    ],
)
def test_presets_count_the_published_parameters(name, parameters):
    assert shape_of(name).num_parameters == parameters


def test_every_preset_is_a_whole_shape():
    for file in (CONF / "model").glob("*.yaml"):
        assert shape_of(file.stem).kv_bytes_per_token > 0
    for file in (CONF / "hardware").glob("*.yaml"):
        assert hardware_of(file.stem).name == file.stem


def test_a_config_json_gives_the_same_shape_as_the_preset():
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-6,
    }
    assert ModelShape.from_hf(config) == shape_of("qwen3_8b")
    del config["vocab_size"]
    with pytest.raises(ConfigError, match="lacks vocab_size"):
        ModelShape.from_hf(config)


def test_a_model_without_a_shape_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"'my/model'.*model\.hidden_size"):
        ModelConfig(name_or_path="my/model").shape()


def test_a_local_checkpoint_brings_its_own_shape(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 3, '
        '"num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 50}'
    )
    shape = ModelConfig(name_or_path=str(tmp_path)).shape()
    assert (shape.num_hidden_layers, shape.head_dim, shape.num_key_value_heads) == (3, 16, 4)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        ModelConfig(name_or_path=str(tmp_path)).shape()


# ---- the roofline ----------------------------------------------------------------------------------------


def test_a_decode_step_takes_its_bytes_when_memory_is_the_limit():
    cost = Roofline(SHAPE, replace(UNIT, peak_flops=1e30))
    contexts = [10, 20, 30]
    read = SHAPE.weight_bytes + sum(c + 1 for c in contexts) * SHAPE.kv_bytes_per_token
    written = len(contexts) * SHAPE.kv_bytes_per_token
    assert cost.step_time(contexts, [1, 1, 1]) == pytest.approx(read + written)


@pytest.mark.parametrize("chunks", [[(0, 7)], [(5, 3), (0, 16)], [(9, 1), (4, 2)]])
def test_a_prefill_step_takes_its_flops_when_compute_is_the_limit(chunks):
    cost = Roofline(SHAPE, replace(UNIT, memory_bandwidth=1e30))
    expected = 0
    for start, length in chunks:
        expected += (
            sum(SHAPE.flops_per_token(start + i + 1) - SHAPE.head_flops for i in range(length))
            + SHAPE.head_flops
        )
    assert cost.step_time(*map(list, zip(*chunks, strict=True))) == pytest.approx(expected)


def test_achieved_fractions_and_overheads_count():
    slow = replace(UNIT, peak_flops=1e30, bandwidth_fraction=0.5, step_overhead=3.0, layer_overhead=10.0)
    full = Roofline(SHAPE, replace(UNIT, peak_flops=1e30)).step_time([4], [1])
    assert Roofline(SHAPE, slow).step_time([4], [1]) == pytest.approx(
        2 * full + 3 + 10 * SHAPE.num_hidden_layers
    )


def test_attention_hides_nothing_of_the_matrix_products():
    """Products that compute bounds and attention that memory bounds: their times add up."""
    flops = 1000 * (SHAPE.linear_flops_per_token + SHAPE.head_flops)
    moved = 2 * 1000 * SHAPE.kv_bytes_per_token  # read and written
    hardware = replace(UNIT, peak_flops=flops / moved)
    assert SHAPE.weight_bytes < moved
    assert Roofline(SHAPE, hardware).step_time([0] * 1000, [1] * 1000) == pytest.approx(2 * moved)


def test_untied_input_embeddings_are_not_read():
    untied = replace(SHAPE, tie_word_embeddings=False)
    bound = replace(UNIT, peak_flops=1e30)
    assert Roofline(untied, bound).step_time([], []) == Roofline(SHAPE, bound).step_time([], [])
    assert untied.weight_bytes > SHAPE.weight_bytes


def test_tensor_parallel_splits_the_work_and_pays_two_all_reduces_a_layer():
    hardware = replace(UNIT, peak_flops=1e30, link_latency=5.0)
    one, two = Roofline(SHAPE, hardware), Roofline(SHAPE, hardware, tp=2)
    tokens, row = 6, SHAPE.hidden_size * 2
    reduces = 2 * SHAPE.num_hidden_layers * (5.0 + 2 * (2 - 1) / 2 * tokens * row)
    assert two.step_time([0], [tokens]) == pytest.approx(one.step_time([0], [tokens]) / 2 + reduces)


def test_kv_heads_are_replicated_when_there_are_fewer_than_ranks():
    assert (
        Roofline(SHAPE, UNIT, tp=8).kv_bytes_per_token
        == Roofline(SHAPE, UNIT, tp=4).kv_bytes_per_token
        == SHAPE.kv_bytes_per_token / 4
    )


def test_a_plan_alone_gains_nothing_from_pipeline_stages_but_plans_in_flight_do():
    free_link = replace(UNIT, link_bandwidth=1e30)
    assert Roofline(SHAPE, free_link, pp=4).step_time([3], [2]) == pytest.approx(
        Roofline(SHAPE, free_link).step_time([3], [2])
    )
    shape = shape_of("qwen3_8b")
    durations = {}
    for pp, inflight in ((1, 1), (4, 1), (4, 4)):
        engine = build(
            prepared(shape, hardware_of("h200"), pp=pp),
            max_inflight=inflight,
            num_blocks=4000,
            max_num_batched_tokens=512,
        )
        arrivals = [Arrival(0.0, [i] * 512, SamplingParams(max_tokens=1)) for i in range(40)]
        durations[pp, inflight] = engine.run(arrivals).duration
    assert durations[4, 1] == pytest.approx(durations[1, 1], rel=0.1)
    assert durations[4, 4] < 0.4 * durations[1, 1]


@pytest.mark.parametrize("tp, pp, match", [(3, 1, "tp=3"), (1, 9, "only 4 layers"), (0, 1, "at least 1")])
def test_parallel_sizes_that_do_not_fit_are_refused(tp, pp, match):
    with pytest.raises(ConfigError, match=match):
        Roofline(SHAPE, UNIT, tp, pp)


# ---- capacity --------------------------------------------------------------------------------------------


def test_kv_capacity_is_what_memory_leaves():
    shape, hardware = shape_of("qwen3_8b"), hardware_of("h200")
    executor = prepared(shape, hardware, memory_utilization=0.9, activation_gb=2.0)
    left = hardware.memory_gb * GIB * 0.9 - shape.weight_bytes - 2 * GIB
    assert executor.kv_capacity(16) == int(left // (16 * shape.kv_bytes_per_token))
    assert build(executor).pool.num_blocks == executor.kv_capacity(16)


def test_a_model_that_does_not_fit_says_what_to_do_and_fits_on_more_ranks():
    shape, hardware = shape_of("llama_3_1_70b"), hardware_of("h100")
    with pytest.raises(ConfigError, match=r"131\.4 GiB of weights.*h100.*parallel\.tp"):
        prepared(shape, hardware).kv_capacity(16)
    assert prepared(shape, hardware, tp=4).kv_capacity(16) > 1000


# ---- the executor in the loop ----------------------------------------------------------------------------


def run(executor=None, seed=0, n=6, inflight=1, **arrival):
    arrivals = [
        Arrival(
            0.001 * i,
            [i] * 20,
            SamplingParams(max_tokens=arrival.get("max_tokens", 9)),
            **arrival.get("rest", {}),
        )
        for i in range(n)
    ]
    return build(executor or prepared(), seed, max_inflight=inflight, num_blocks=64).run(arrivals)


def test_tokens_are_a_function_of_seed_request_and_position_alone():
    alone, together, overlapped, other = run(n=1), run(n=6), run(n=6, inflight=2), run(n=6, seed=1)

    def tokens(result):
        return [o.output_token_ids for o in result.outputs]

    assert tokens(alone) == tokens(together)[:1]
    assert tokens(together) == tokens(overlapped) != tokens(other)
    assert len(set(map(tuple, tokens(together)))) == 6


def test_tokens_never_end_a_request_so_that_only_lengths_do():
    eos = frozenset(range(0, 100, 3))
    result = run(prepared(eos=eos), max_tokens=200)
    assert [len(o.output_token_ids) for o in result.outputs] == [200] * 6
    assert not eos & {t for o in result.outputs for t in o.output_token_ids}


def test_a_hidden_length_ends_a_request_and_without_one_its_limit_does():
    hidden = run(rest={"output_len": 4}).outputs
    assert {(len(o.output_token_ids), o.finish_reason) for o in hidden} == {(4, "stop")}
    assert {(len(o.output_token_ids), o.finish_reason) for o in run().outputs} == {(9, "length")}


def test_stop_strings_are_refused_where_no_tokenizer_can_see_them():
    asked = [
        Arrival(0.0, [1, 2], SamplingParams(max_tokens=4, stop=stop), output_len=4) for stop in ((), ".")
    ]
    finished, rejected = build(prepared()).run(asked).outputs
    assert finished.state == "finished"
    assert (
        rejected.state == "rejected"
        and "stop strings need a tokenizer" in rejected.finish_reason
        and "stop_token_ids" in rejected.finish_reason
    )


def test_virtual_time_is_the_sum_of_step_times():
    executor = prepared(hardware=hardware_of("a100"))
    result = build(executor, num_blocks=64).run([Arrival(2.0, [1] * 10, SamplingParams(max_tokens=3))])
    steps = [
        executor.cost_model.step_time([0], [10]),
        executor.cost_model.step_time([10], [1]),
        executor.cost_model.step_time([11], [1]),
    ]
    assert result.outputs[0].token_times == pytest.approx(
        [2 + sum(steps[:1]), 2 + sum(steps[:2]), 2 + sum(steps)]
    )
    assert result.busy_time == pytest.approx(sum(steps))


def test_policy_time_is_charged_where_asked_and_hidden_by_a_plan_in_flight():
    slow_step = Hardware(step_overhead=0.01)

    def seconds(charge, inflight):
        return run(prepared(hardware=slow_step, charge_policy_time=charge), inflight=inflight).duration

    emitted = 6 * 9
    assert seconds(0.001, 1) == pytest.approx(seconds(0.0, 1) + 0.001 * emitted, rel=0.02)
    assert seconds(0.001, 2) < seconds(0.0, 2) + 0.001 * 7  # only the first plan's host time shows


@pytest.mark.parametrize(
    "parameters",
    [{"memory_utilization": 0.0}, {"activation_gb": -1}, {"charge_policy_time": -1e-6}, {"max_plans": 0}],
)
def test_parameters_out_of_range_are_named(parameters):
    with pytest.raises(ConfigError, match=f"executor.{next(iter(parameters))}="):
        SimExecutor(**parameters)


@pytest.mark.parametrize(("name", "measured"), [("qwen3_0_6b", 4.85), ("qwen3_8b", 13.88)])
def test_the_public_benchmark_takes_what_it_took_on_a_gpu(name, measured):
    """Seconds of docs/performance.md. The hardware's fractions come from this model's steps and that one's
    prompts, not from these runs."""
    engine = build(
        prepared(shape_of(name), hardware_of("h200")),
        scheduler=PrefillFirst(),
        max_num_batched_tokens=16384,
        max_model_len=4096,
    )
    result = engine.run(NanoBench().arrivals(0, 151936, 4096))
    assert sum(len(o.output_token_ids) for o in result.outputs) == 133_966
    assert result.duration == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("case", sim_error.CASES, ids=str)
def test_measured_steps_are_predicted_as_well_as_the_documentation_says(case):
    cost = Roofline(shape_of(case.model), hardware_of("h200"), tp=case.tp)
    smallest = case.model == "qwen3_0_6b" and case.running == 1
    assert case.predicted(cost) == pytest.approx(case.measured, rel=0.23 if smallest else 0.11)


def test_the_simulated_executor_and_its_clock_are_public():
    import headway

    executor = headway.SimExecutor()
    executor.prepare(SHAPE, Hardware())
    assert isinstance(executor, SimExecutor) and isinstance(executor.clock, headway.VirtualClock)


def test_a_simulated_run_names_its_time_model_and_the_error_that_it_states():
    def told(hardware: Hardware) -> tuple[str, float | None]:
        executor = SimExecutor()
        executor.prepare(kit.SHAPE.shape(), hardware)
        engine = Engine(default_roles(executor=executor), EngineConfig(num_blocks=20))
        summary = summarize(engine.run([Arrival(0.0, [1, 2, 3], output_len=2)]))
        return summary["time_model"], summary["time_model_error"]

    assert told(Hardware(name="made", step_error=0.25)) == ("roofline of made, tp=1 pp=1", 0.25)
    assert told(Hardware(name="made")) == ("roofline of made, tp=1 pp=1", None)
