"""Numbers that are wrong are refused where they are given, everywhere in one way; others run to finite
results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, fields
from itertools import islice, product
from random import Random
from typing import Any

import numpy as np
import pytest
from helpers.numeric import Table, Try, judge, numbered_registry, slice_of, tries

from core.cli import schema
from core.compose.build import Composition, build_roles
from core.compose.config import EngineConfig, Hardware, ModelConfig, ParallelConfig
from core.compose.hooks import Registry, load_registry
from core.compose.memory import host_memory
from core.compose.params import check, describe, limits_of, param
from core.errors import ConfigError, PluginError
from core.inputs import SLO, SamplingParams
from headway import LLM, KeyOrder, Order
from plugins.executors.sim import SimExecutor
from plugins.parallel.config import MeshConfig
from plugins.workloads.pace import arrival_times
from plugins.workloads.random_lengths import RandomLengths

NAN, INF = math.nan, math.inf


@dataclass
class Knobs(Order):
    """One of each kind."""

    share: float = param(0.5, min=0, below=1, unit="of the pool", doc="kept free")
    count: int | None = param(3, min=1, max=9)
    table: dict[str, float] = param({"a": 1.0}, above=0)
    many: list[int | list[int]] = param([1, [2, 3]], min=1)
    kind: str = param("near", choices=("near", "far"))
    open_end: float = param(1.0, min=0, finite=False)
    plain: float = 1.0
    flag: bool = False

    def order(self, view: Any) -> Any:
        return view.waiting


# ---- one parameter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"share": NAN}, "order.share=nan: expected a finite number >= 0 and < 1"),
        ({"share": 1}, "order.share=1: expected a finite number >= 0 and < 1"),
        ({"share": True}, "order.share=True: expected a finite number"),
        ({"share": "0.5"}, "order.share='0.5': expected a finite number"),
        ({"share": None}, "order.share=None: expected a finite number"),
        ({"share": 10**400}, "expected a finite number >= 0 and < 1"),
        ({"count": 0}, "order.count=0: expected at least 1 and at most 9"),
        ({"count": 10}, "order.count=10: expected at least 1 and at most 9"),
        ({"count": 2.5}, "order.count=2.5: expected a whole number, at least 1 and at most 9, or none"),
        ({"count": True}, "order.count=True: expected a whole number"),
        ({"count": np.float64(2)}, "order.count=2.0: expected a whole number"),
        ({"table": {"a": 1.0, "b": -1.0}}, "order.table.b=-1.0: expected a finite number > 0"),
        ({"table": [1.0]}, "order.table=[1.0]: expected a table of names, each a finite number > 0"),
        ({"many": [1, [2, 0]]}, "order.many[1][1]=0: expected at least 1"),
        ({"many": 3}, "order.many=3: expected a list, each a whole number, at least 1, or a list"),
        ({"kind": "nere"}, "order.kind='nere': expected one of near, far. Did you mean near?"),
        ({"open_end": NAN}, "order.open_end=nan: expected a number >= 0"),
        ({"plain": INF}, "order.plain=inf: expected a finite number"),
        ({"flag": 1}, "order.flag=1: expected true or false"),
    ],
)
def test_a_wrong_value_is_named_with_its_node_and_what_was_expected(given, said):
    with pytest.raises(ConfigError) as caught:
        Knobs(**given)
    assert said in str(caught.value)


def test_what_is_right_is_taken_and_numpy_s_scalars_become_python_s():
    knobs = Knobs(
        share=np.float32(0.25), count=np.int64(9), table={"a": 2}, many=[[4, 5]], open_end=INF, plain=3
    )
    assert (knobs.share, knobs.count, knobs.table, knobs.many, knobs.open_end) == (
        0.25,
        9,
        {"a": 2.0},
        [[4, 5]],
        INF,
    )
    assert {type(knobs.share), type(knobs.plain), type(knobs.table["a"])} == {float} and type(
        knobs.count
    ) is int
    assert Knobs(count=None).count is None


def test_a_list_or_table_as_default_belongs_to_one_object():
    one, other = Knobs(), Knobs()
    one.table["b"] = 2.0
    one.many.append(7)
    assert other.table == {"a": 1.0} and other.many == [1, [2, 3]]


@dataclass
class Inner:
    depth: int = param(1, min=0)


@dataclass
class Nested(Knobs):
    inner: Inner = field(default_factory=Inner)
    tiers: list[SLO] | None = None


def test_a_table_in_a_parameter_is_checked_to_its_leaves():
    nested = Nested(inner={"depth": 2}, tiers=[{"ttft": 1}, SLO(tpot=0.5)])
    assert nested.inner == Inner(2) and nested.tiers == [SLO(ttft=1.0), SLO(tpot=0.5)]
    wrong = {
        "order.inner.depth=-1: expected at least 0": {"inner": {"depth": -1}},
        "order.inner.dept=1: expected one of the parameters depth": {"inner": {"dept": 1}},
        "order.inner=3: expected a table of depth": {"inner": 3},
        "order.tiers[1].ttft=-1: expected a finite number > 0": {"tiers": [SLO(), {"ttft": -1}]},
        "order.tiers[0]=nan: expected a table of ttft, tpot, e2el": {"tiers": [NAN]},
    }
    for said, given in wrong.items():
        with pytest.raises(ConfigError) as caught:
            Nested(**given)
        assert said in str(caught.value)


def test_a_plugin_s_own_post_init_finds_only_what_is_right():
    @dataclass
    class Own(Knobs):
        def __post_init__(self) -> None:
            self.inverse = 1 / (1 - self.share)

    assert Own(share=0.5).inverse == 2.0
    with pytest.raises(ConfigError, match="order.share=1.0"):
        Own(share=1.0)


def test_parameters_of_a_function_are_checked_as_those_of_a_class():
    @dataclass
    class Config:
        speed: float = param(1.0, above=0)

    registry = Registry()
    registry.add("order", "made", lambda config: Knobs(), Config)
    with pytest.raises(ConfigError, match="order.speed=0: expected a finite number > 0"):
        build_roles(registry, {"order": ("made", {"speed": 0})})


def test_a_default_outside_of_its_own_range_is_a_broken_plugin():
    @dataclass
    class Off(Knobs):
        count: int = param(0, min=1)

    with pytest.raises(PluginError, match=r"order=off .*order.count=0: expected at least 1"):
        Registry().add("order", "off", Off)


def test_a_field_says_its_range_in_a_few_words():
    said = {f.name: describe(f) for f in fields(Knobs)}
    assert (
        said["share"] == ">= 0 and < 1, of the pool"
        and said["count"] == "1 to 9"
        and said["kind"] == "near | far"
    )
    assert said["plain"] == "" and said["open_end"] == ">= 0, may be infinite"
    assert str(limits_of(Knobs.__dataclass_fields__["share"])) == ">= 0 and < 1, of the pool; kept free"


def test_a_range_survives_on_the_way_through_the_config():
    from omegaconf import OmegaConf

    node = schema.node(Knobs, "knobs")
    ranges = {f.name: describe(f) for f in fields(node) if f.name != "name"}
    assert ranges == {f.name: describe(f) for f in fields(Knobs)}
    values = vars(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(node), {"share": 1, "count": 2})))
    assert values["share"] == 1.0 and isinstance(values["share"], float) and values["table"] == {"a": 1.0}


def test_the_list_of_plugins_shows_ranges():
    command = [sys.executable, "-m", "headway", "plugins", "order"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "wp: float = 1.0 (0 to 1e+06)" in shown
    listed = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    )
    vtc = next(p for p in listed["plugins"] if p["name"] == "vtc")
    assert vtc["parameters"][0] == {"name": "wp", "type": "float", "default": 1.0, "range": "0 to 1e+06"}


# ---- the core's own nodes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: EngineConfig(block_size=True), "engine.block_size=True"),
        (lambda: EngineConfig(max_num_seqs=2.5), "engine.max_num_seqs=2.5: expected a whole number"),
        (
            lambda: EngineConfig(num_blocks=10**12),
            "engine.num_blocks=1000000000000: expected at least 1 and at most",
        ),
        (lambda: EngineConfig(max_model_len=10**18), "engine.max_model_len=1000000000000000000: expected"),
        (lambda: Hardware(memory_bandwidth=NAN), "hardware.memory_bandwidth=nan: expected a finite number"),
        (lambda: Hardware(memory_gb=1e6), "hardware.memory_gb=1000000.0: expected a finite number"),
        (lambda: Hardware(step_overhead=INF), "hardware.step_overhead=inf"),
        (
            lambda: ModelConfig(num_hidden_layers=10**9),
            "model.num_hidden_layers=1000000000: expected at least 1 and at most 1000",
        ),
        (lambda: ModelConfig(rope_theta=NAN), "model.rope_theta=nan"),
        (lambda: ParallelConfig(layers=[2, 0]), r"parallel.layers[1]=0: expected at least 1"),
        (lambda: MeshConfig(timeout=INF), "parallel.timeout=inf"),
        (lambda: SLO(ttft=-1), "slo.ttft=-1: expected a finite number > 0"),
        (lambda: SLO(e2el=NAN), "slo.e2el=nan"),
        (lambda: Composition({}, seed=2.5), "seed=2.5: expected a whole number"),
    ],
)
def test_a_wrong_number_of_a_core_node_is_refused(build, said):
    with pytest.raises(ConfigError) as caught:
        build()
    assert said in str(caught.value)


def test_a_pool_that_no_memory_holds_is_refused_with_an_estimate():
    blocks = min(2**31 - 1, 4 * (host_memory() or 0) // 340)
    with pytest.raises(
        ConfigError,
        match=rf"engine.num_blocks={blocks}: keeping count .* needs about .* GiB, this machine has",
    ):
        EngineConfig(num_blocks=blocks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"kv_cache_gb": 16384},
            "executor.kv_cache_gb=16384.0: a KV cache of that size needs about 16,384.0 GiB",
        ),
        ({"kv_cache_gb": 1e-9}, "executor.kv_cache_gb=1e-09: holds no KV block of 16 tokens"),
        (
            {"num_blocks": 60_000_000},
            "engine.num_blocks=60000000: a KV cache of so many blocks of 16 tokens needs about",
        ),
        (
            {"max_num_seqs": 2**20, "block_size": 1, "max_model_len": 2**16},
            "engine.max_num_seqs=1048576: block tables of 65536 tokens",
        ),
        ({"hidden_size": 2**20}, "model.name_or_path=made: "),
        (
            {"max_position_embeddings": 2**24, "head_dim": 2**12},
            "model.max_position_embeddings=16777216: the table of rotary",
        ),
    ],
)
def test_what_the_real_engine_cannot_hold_is_refused_by_the_parameter_that_asks_for_it(
    options, said, monkeypatch
):
    monkeypatch.setattr("core.compose.memory.host_memory", lambda: 2**35)  # the same on every machine
    shape = {
        "load_format": "dummy",
        "architecture": "Qwen3ForCausalLM",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "vocab_size": 2**14,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2**16,
        "dtype": "float32",
    }
    with pytest.raises(ConfigError) as caught:
        LLM("made", **{"device": "cpu", "num_blocks": None, **shape, **options})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": NAN}, "temperature=nan: expected a finite number >= 0"),
        ({"temperature": INF}, "temperature=inf"),
        ({"temperature": "0"}, "temperature='0'"),
        ({"top_k": 2.5}, "top_k=2.5: expected a whole number, at least -1"),
        ({"top_p": NAN}, "top_p=nan"),
        ({"max_tokens": 2.5}, "max_tokens=2.5: expected a whole number, at least 1, or none"),
        ({"logprobs": True}, "logprobs=True"),
        ({"seed": "abc"}, "seed='abc'"),
        ({"stop": ""}, "stop=''"),
        ({"stop": (3,)}, "stop[0]=3: expected a text"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids[0]=1.5: expected a whole number"),
        ({"ignore_eos": 1}, "ignore_eos=1: expected true or false"),
    ],
)
def test_a_wrong_sampling_parameter_is_a_value_error_that_names_it(given, said):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**given)
    assert said in str(caught.value)


def test_sampling_parameters_of_numpy_and_of_vllm_are_taken():
    asked = SamplingParams(
        max_tokens=np.int64(4),
        top_k=np.int32(2),
        temperature=np.float32(0.5),
        stop=None,
        stop_token_ids=[np.int64(7)],
    )
    assert (asked.max_tokens, asked.top_k, asked.temperature, asked.stop, asked.stop_token_ids) == (
        4,
        2,
        0.5,
        (),
        (7,),
    )
    assert type(asked.max_tokens) is int and type(asked.stop_token_ids[0]) is int
    assert SamplingParams(temperature=1e-9) == SamplingParams(temperature=0.0), "greedy, as in vLLM"


# ---- the matrix ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry() -> Registry:
    return numbered_registry()


def test_every_number_of_every_parameter_is_refused_by_name_or_runs_to_finite_results(registry):
    """A slice that is the same every time; `python -m tests.helpers.numeric` tries them all."""
    table = Table([judge(of, registry) for of in slice_of([of for of in tries(registry) if is_cheap(of)], 4)])
    wrong = [f"{verdict.of}: {verdict.kind}: {verdict.said}" for verdict in table.verdicts if verdict.wrong]
    assert not wrong, "\n".join(wrong)
    assert len(table.verdicts) > 300, "the registry is not empty"


def test_nan_is_refused_for_every_parameter_there_is(registry):
    """Whatever the type: nothing is NaN."""
    verdicts = [judge(of, registry) for of in tries(registry) if is_nan(of.value)]
    assert not [str(verdict.of) for verdict in verdicts if verdict.kind != "refused"]


def is_cheap(of: Try) -> bool:
    """Needs no model, and no second to make a prompt of ten million tokens."""
    number = of.value[0] if isinstance(of.value, list) and of.value else of.value
    large = of.node == "workload" and isinstance(number, (int, float)) and 10_000 < number < 1e9
    return of.node not in ("kernels", "sampling") and of.plugin not in ("torch", "wandb") and not large


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


# ---- planted bugs: the matrix finds them -----------------------------------------------------------------


def faults(registry: Registry, role: str, name: str) -> dict[Any, str]:
    """Value -> what was found, of the tries of one plugin."""
    mine = [of for of in tries(registry) if (of.node, of.plugin) == (role, name)]
    return {repr(v.of.value): v.kind for of in mine if (v := judge(of, registry, seconds=0.25)).wrong}


@dataclass
class Creeping(KeyOrder):
    """Walks to 1 in steps that may be nothing."""

    step: float = 0.5

    def key(self, request: Any) -> float:
        at = 0.0
        while 0 <= at < 1:
            at += self.step
        return at


@dataclass
class BoundedCreeping(Creeping):
    """The same, and says what the step may be."""

    step: float = param(0.5, min=0.01, max=10)


@dataclass
class Racing(SimExecutor):
    """Steps that take `1 / speed` as long."""

    speed: float = 1.0

    def launch(self, plan: Any) -> Any:
        plan, begin, end = super().launch(plan)
        return plan, begin, begin + (end - begin) / self.speed


def test_a_loop_over_a_number_without_a_range_is_found(registry):
    registry.add("order", "creeping", Creeping)
    registry.add("order", "bounded_creeping", BoundedCreeping)
    found = faults(registry, "order", "creeping")
    assert found["0"] == "loops" and found["5e-324"] == "loops"
    assert not faults(registry, "order", "bounded_creeping")


def test_times_that_are_infinite_or_run_backwards_are_found(registry):
    registry.add("executor", "racing", Racing)
    found = faults(registry, "executor", "racing")
    assert found["0"] == "fails"
    assert found["5e-324"] == "fails", "the engine stops at a time that is infinite, and names the executor"
    assert found["-1"] == "not finite"


def test_a_default_is_checked_where_its_class_is_not_registered():
    broken = Knobs()
    broken.share = NAN
    with pytest.raises(ConfigError, match="order.share=nan"):
        check(broken, "order")


def test_every_numeric_parameter_of_the_box_declares_its_range():
    registry = load_registry()
    bare = [
        f"{role}={name}: {f.name}"
        for (role, name), plugin in registry.plugins.items()
        if not plugin.origin.dist
        for f in plugin.parameters()
        if ("int" in str(f.type) or "float" in str(f.type)) and not describe(f)
    ]
    core = [(config.__name__, f) for config in schema.NODES.values() for f in fields(config)]
    bare += [
        f"{name}.{f.name}" for name, f in core if f.type.startswith(("int", "float")) and not describe(f)
    ]
    assert not bare


def test_arrivals_come_at_finite_times_in_every_corner_of_their_ranges():
    fields_of = RandomLengths.__dataclass_fields__
    rate, burstiness = limits_of(fields_of["rate"]), limits_of(fields_of["burstiness"])
    ends = (rate.min, rate.max), (burstiness.min, burstiness.max)
    for arrival, r, b in product(("uniform", "poisson", "gamma"), *ends):
        times = list(islice(arrival_times(arrival, r, b, Random(1)), 2000))
        assert times == sorted(times) and math.isfinite(times[-1]) and times[-1] > 0, (arrival, r, b)
