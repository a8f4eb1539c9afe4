"""Hydra's side: every option composes, wrong names and types are refused in plain words, objects are shared
and prepared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.cli import schema
from core.cli.arguments import arguments
from core.cli.explain import explain
from core.compose.build import Composition, build, build_roles
from core.compose.config import EngineConfig, ModelConfig, ParallelConfig, ResultsConfig
from core.compose.defaults import PLANNING, default_choices, default_names
from core.compose.hooks import OPTIONAL, Registry, load_registry
from core.errors import PluginError
from core.policy import ROLES
from headway import SLO, Arrival, ConfigError, HeadwayError, Order, SamplingParams, Victim
from plugins.parallel.config import MeshConfig

CONF = Path(__file__).resolve().parent.parent / "conf"


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    registry = load_registry()
    schema.register(registry)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield registry


def cfg(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


def refusal(registry: Registry, *overrides: str) -> str:
    """What a user reads after typing these."""
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        cfg(*overrides)
    return explain(caught.value, registry, overrides)


def presets() -> list[tuple[str, str]]:
    return [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml"))]


def test_the_default_composition_is_what_the_plugins_say(registry):
    c = schema.composition(cfg())
    assert c.choices["scheduler"][0] == "chunked"
    assert not set(OPTIONAL) - {"tracking"} & set(c.choices)
    assert (c.engine, c.parallel, c.slo, c.seed) == (EngineConfig(), MeshConfig(), SLO(), 0)
    for role, (name, parameters) in c.choices.items():
        default = registry.get(role, name).build()
        assert all(_same(getattr(default, k), v) for k, v in parameters.items()), role


def test_what_is_composed_without_hydra_is_the_same_composition(registry):
    choices = schema.composition(cfg()).choices
    assert dict(default_names()) == {role: name for role, (name, _) in choices.items()} | {"parallel": "mesh"}
    assert default_choices() == {role: (choices[role][0], {}) for role in PLANNING}


def test_the_default_composition_is_changed_and_added_to_by_role():
    changed = default_choices(order="sjf", predictor=("noisy", {"cv": 0.5}))
    assert changed == default_choices() | {"order": ("sjf", {}), "predictor": ("noisy", {"cv": 0.5})}


def _same(a: Any, b: Any) -> bool:
    return (list(a) if isinstance(a, tuple) else a) == b


def test_every_plugin_composes_to_its_own_parameters(registry):
    # one per role
    for chosen in zip_longest(
        *([registry.plugins[role, name] for name in registry.names(role)] for role in schema.GROUP_ROLES)
    ):
        plugins = [plugin for plugin in chosen if plugin is not None]
        required = [
            f"{p.role}.{f.name}=0" for p in plugins for f in p.parameters() if f.default is f.default_factory
        ]
        choices = schema.composition(cfg(*(f"{p.role}={p.name}" for p in plugins), *required)).choices
        for plugin in plugins:
            name, parameters = choices[plugin.role]
            assert name == plugin.name
            assert list(parameters) == [f.name for f in plugin.parameters()]


@pytest.mark.parametrize(("group", "option"), presets())
def test_every_preset_composes(registry, group, option):
    schema.composition(cfg(f"{group}={option}"))


SHORT = {
    "policy": ("executor=sim", "workload.num_requests=6", "slo.ttft=100", "slo.tpot=10"),
    "experiment": ("workload.duration=3",),
}


@pytest.mark.parametrize(("group", "option"), [p for p in presets() if p[0] in SHORT])
def test_every_policy_and_experiment_runs(registry, group, option):
    run = build(registry, schema.composition(cfg(f"{group}={option}", "tracking=none", *SHORT[group])))
    outputs = run.execute().outputs
    assert outputs and all(o.state == "finished" for o in outputs)


@pytest.mark.parametrize("role", OPTIONAL)
def test_a_role_that_may_be_absent_has_the_option_none(registry, role):
    assert role not in schema.composition(cfg(f"{role}=none")).choices


def test_parameters_of_the_command_line_reach_the_plugin(registry):
    c = schema.composition(
        cfg(
            "scheduler=chunked",
            "scheduler.token_budget=99",
            "engine.block_size=4",
            "parallel.tp=4",
            "slo.ttft=0.5",
            "seed=7",
        )
    )
    roles, _ = build_roles(registry, c.choices)
    assert roles["scheduler"].token_budget == 99
    assert (c.engine.block_size, c.parallel.tp, c.slo.ttft, c.seed) == (4, 4, 0.5, 7)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("schedulr=fcfs", "schedulr: there is no such key. Did you mean scheduler"),
        ("scheduler=chunkd", "scheduler=chunkd: there is no such scheduler. Did you mean chunked?"),
        ("model=qwen3_8", "model=qwen3_8: there is no such model. Did you mean qwen3_8b"),
        (
            "scheduler.tokn_budget=4",
            "scheduler.tokn_budget: scheduler=chunked has no such parameter. Did you mean token_budget?",
        ),
        ("engine.blok_size=3", "engine.blok_size: engine has no such parameter. Did you mean block_size"),
        ("hardware.memory=3", "hardware.memory: hardware has no such parameter. Did you mean memory_gb"),
        ("scheduler.token_budget=abc", "scheduler.token_budget=abc: expected a whole number or null"),
        ("seed=abc", "seed=abc: expected a whole number"),
        ("parallel.tpp=2", "parallel.tpp: parallel has no such parameter. Did you mean tp"),
        (
            "order.wp=1",
            "order.wp: order=fcfs has no such parameter. It is one of order=dlpm, order=vtc, "
            "order=vtc_predicted.",
        ),
        ("parallel=mash", "parallel=mash: there is no such parallel. Did you mean mesh?"),
        ("engine.block_size=[1]", "engine.block_size=[1]: expected a whole number"),
        ("kernels.cuda_graphs=maybe", "kernels.cuda_graphs=maybe: expected true or false"),
        ("tracking.project=[a]", "tracking.project=[a]: expected a text"),
        (
            "workload.slo_tiers=[{tft: 1}]",
            "workload.slo_tiers: the chosen workload's slo_tiers has no 'tft'. Did you mean ttft",
        ),
        ("engine=3", "engine=3: expected a parameter, engine.NAME=VALUE"),
        ("~engine.block_size", "~engine.block_size: parameters cannot be removed"),
        (
            "model.name_or_path=it's",
            "model.name_or_path=it's: the value cannot be read. Quote what holds spaces",
        ),
        ("scheduler", "scheduler: expected KEY=VALUE"),
    ],
)
def test_a_wrong_name_or_type_is_refused_with_the_near_names(registry, override, answer):
    assert answer in refusal(registry, override)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("engine.block_size=0", "engine.block_size=0: expected at least 1"),
        ("parallel.tp=0", "parallel.tp=0: expected at least 1"),
        ("model.load_format=gguf", "model.load_format='gguf': expected one of auto, dummy"),
        ("hardware.memory_gb=-1", "hardware.memory_gb=-1.0: expected a finite number > 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_built(registry, override, answer):
    with pytest.raises(ConfigError) as caught:
        schema.composition(cfg(override))
    assert answer in str(caught.value)


def test_a_parameter_without_a_default_must_be_given():
    @dataclass
    class Strict(Order):
        """Has a parameter that nobody can guess."""

        alpha: float

        def order(self, view):
            return view.waiting

    node = OmegaConf.structured(schema.node(Strict, "strict"))
    with pytest.raises(
        ConfigError, match="order.alpha: order=strict cannot do without it. Type order.alpha=VALUE"
    ):
        schema._values(node, node, "order", "order=strict")
    assert schema._values(
        OmegaConf.create({"name": "strict", "alpha": 2}), node, "order", "order=strict"
    ) == {"name": "strict", "alpha": 2.0}


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (("order.weights={c0:2}",), {"c0": 2.0}),
        (("order.weights.c0=2", "order.weights.c1=3"), {"c0": 2.0, "c1": 3.0}),
        (("+order.weights.c0=2",), {"c0": 2.0}),
    ],
)
def test_a_parameter_that_is_a_dictionary_takes_new_entries(registry, overrides, weights):
    composed = cfg("order=vtc", *overrides)
    assert schema.composition(composed).choices["order"][1]["weights"] == weights
    assert "order.weights.c0=x: expected entries" in refusal(registry, "order=vtc", "order.weights.c0=x")
    assert "order.wieghts: order=vtc has no such parameter" in refusal(
        registry, "order=vtc", "order.wieghts={c0:2}"
    )


def test_every_dictionary_of_every_plugin_and_node_takes_new_entries(registry):
    roots = [OmegaConf.structured(schema.node(c)) for c in schema.NODES.values()]
    roots += [ConfigStore.instance().load(f"{role}/{name}.yaml").node for role, name in registry.plugins]
    dictionaries = [
        d for root in roots for d in root.values() if OmegaConf.is_dict(d) and OmegaConf.get_type(d) is dict
    ]
    assert dictionaries and not any(OmegaConf.is_struct(d) for d in dictionaries)


def test_a_config_that_is_composed_already_explains_itself(registry):
    """What `-cp DIR/.hydra -cn config` runs: plain YAML, which knows no types and no choices."""
    plain = OmegaConf.create(OmegaConf.to_yaml(cfg("order=vtc", "order.weights={c0:2}")))
    assert schema.composition(plain).choices["order"][1]["weights"] == {"c0": 2.0}
    for change, answer in [
        ("scheduler.token_budget=abc", "scheduler.token_budget=abc: expected a whole number or null"),
        ("order.wx=1", "order.wx: order=vtc has no such parameter. Did you mean"),
        ("order.weights.c0=x", "order.weights.c0=x: expected entries, like {a: 1, b: 2}, each a number"),
        ("order.name=vct", "order.name=vct: there is no such order. Did you mean vtc"),
        ("engine.blok_size=1", "engine.blok_size: engine has no such parameter. Did you mean block_size"),
        ("scheduler=null", "scheduler: none is chosen, and a run needs one"),
    ]:
        with pytest.raises(ConfigError) as caught:
            schema.composition(OmegaConf.merge(plain, OmegaConf.from_dotlist([change])))
        assert answer in str(caught.value)


def test_a_broken_plugin_that_is_asked_for_says_why(registry):
    registry.broken.append(next(iter(_broken())))
    try:
        assert "import failed: no such module" in refusal(registry, "order=mypaper")
    finally:
        registry.broken.pop()


def _broken():
    from core.compose.hooks import Broken, Origin

    yield Broken(Origin("mypaper", "mypaper.plugin"), "import failed: no such module")


# ---- schemas ---------------------------------------------------------------------------------------------


@dataclass
class Inner:
    depth: int = 1


@dataclass
class Everything(Order):
    """Every kind of field that a plugin may have."""

    optional: int | None = None
    either: int | list[int] = 3
    many: list[float] = field(default_factory=lambda: [1.0])
    pair: tuple[int, int] = (1, 2)
    table: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    choice: Literal["a", "b"] = "a"
    derived: int = field(init=False, default=0)

    def order(self, view):
        return view.waiting


def test_every_kind_of_field_becomes_a_typed_node():
    node = OmegaConf.structured(schema.node(Everything, "everything"))
    given = OmegaConf.merge(
        node,
        {
            "optional": 4,
            "either": [1, 2],
            "many": [2],
            "inner": {"depth": 5},
            "table": {"x": 1},
            "choice": "b",
        },
    )
    values = vars(OmegaConf.to_object(given))
    assert values.pop("name") == "everything"
    assert values == {
        "optional": 4,
        "either": [1, 2],
        "many": [2.0],
        "pair": [1, 2],
        "table": {"x": 1.0},
        "inner": Inner(5),
        "choice": "b",
    }
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(node, {"many": ["x"]})
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(node, {"inner": {"dept": 5}})


# ---- building --------------------------------------------------------------------------------------------


@dataclass
class Counter(Order, Victim):
    """Fills two roles with one state."""

    weight: float = 1.0

    def order(self, view):
        return view.waiting

    def victims(self, need, view):
        return reversed(view.running)


def two_roles(order: dict[str, Any], victim: dict[str, Any]):
    registry = Registry()
    registry.add("order", "counter", Counter)
    registry.add("victim", "counter", Counter)
    roles, _ = build_roles(registry, {"order": ("counter", order), "victim": ("counter", victim)})
    return roles


def test_roles_that_name_one_factory_share_one_object():
    roles = two_roles({"weight": 1.0}, {"weight": 1.0})
    assert roles["order"] is roles["victim"]
    assert roles["order"].plugin_name == "order=counter"


@pytest.mark.parametrize("node", ["order", "victim"])
def test_a_shared_objects_parameters_may_be_given_at_either_node(node):
    given = {"order": {"weight": 1.0}, "victim": {"weight": 1.0}} | {node: {"weight": 2.5}}
    assert two_roles(**given)["order"].weight == 2.5


def test_a_shared_object_given_two_values_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"order.weight=2.0 and victim.weight=3.0: order and victim are one object \(counter\)",
    ):
        two_roles({"weight": 2.0}, {"weight": 3.0})


def test_an_unknown_parameter_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError, match="order.wait: order=counter has no such parameter. Did you mean weight"
    ):
        two_roles({"wait": 2.0}, {})


def simulated(registry: Registry, **changes: Any) -> Composition:
    c = schema.composition(cfg("executor=sim", "tracking=none", "workload.num_requests=3"))
    for name, value in changes.items():
        setattr(c, name, value)
    return c


def test_one_process_can_build_and_run_many(registry):
    hashes = {build(registry, simulated(registry)).execute().decision_hash for _ in range(2)}
    assert len(hashes) == 1


def test_an_executor_gets_what_its_prepare_names(registry):
    run = build(registry, simulated(registry, parallel=ParallelConfig(tp=2, pp=2)))
    assert (run.engine.executor.roofline.tp, run.engine.executor.roofline.pp) == (2, 2)


def test_a_model_without_a_known_shape_is_refused_by_the_simulator(registry):
    with pytest.raises(ConfigError, match="the shape of model '/no/such/checkpoint' is not known"):
        build(registry, simulated(registry, model=ModelConfig("/no/such/checkpoint")))


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (
            ("order=sjf",),
            "order=sjf needs a predictor, and none is chosen: set predictor=constant, history, noisy or "
            "oracle",
        ),
        (
            ("policy=mooncake", "executor=sim"),
            "admission=early_reject goes by latency targets, .*: set slo.ttft",
        ),
        (("order=edf", "workload.slo_tiers=[]"), "order=edf goes by latency targets, and no request has any"),
        (
            ("workload=mooncake", "workload.path=/no/such/trace"),
            "workload.path=/no/such/trace: there is no such file",
        ),
        (
            ("workload=chat", "workload.path=/no/such/texts"),
            "workload.path=/no/such/texts: there is no such file",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_is_loaded(registry, monkeypatch, overrides, answer):
    monkeypatch.setattr(
        "core.compose.build.prepare_executor", lambda *given: pytest.fail("the executor was prepared")
    )
    with pytest.raises(HeadwayError, match=answer):
        build(registry, schema.composition(cfg(*overrides)))


@pytest.mark.parametrize(
    "targets",
    [("slo.ttft=9",), ("workload.slo_tiers=[{ttft: 9}]",), ("admission.ttft=9",), ("admission.tbt=9",)],
)
def test_early_reject_is_composed_where_somebody_has_a_target(registry, targets):
    build(registry, schema.composition(cfg("policy=mooncake", "executor=sim", "tracking=none", *targets)))


def test_a_run_of_one_rank_refuses_more(registry):
    c = schema.composition(cfg("executor=oracle", "parallel.tp=4"))
    with pytest.raises(
        ConfigError,
        match=r"parallel.tp=4 parallel.pp=1: executor=oracle runs on one rank; more is not there yet. "
        "Set both to 1, or executor to one of replay, sim, torch",
    ):
        build(registry, c)


def test_requests_without_targets_get_those_of_the_run(registry):
    own = Arrival(0.0, [1], SamplingParams(), slo=SLO(ttft=9.0))
    from core.compose.build import with_slo

    assert [a.slo.ttft for a in with_slo([own, Arrival(0.0, [1])], SLO(ttft=1.0))] == [9.0, 1.0]


# ---- the command line ------------------------------------------------------------------------------------


def test_a_path_or_hub_id_becomes_a_model_of_ones_own(tmp_path):
    assert arguments(["model=org/some-model"], CONF)[0] == [
        "model=custom",
        "model.name_or_path='org/some-model'",
    ]
    assert arguments([f"model={tmp_path}"], CONF)[0] == ["model=custom", f"model.name_or_path='{tmp_path}'"]
    assert arguments(["model=qwen3_8b"], CONF)[0] == ["model=qwen3_8b"]


@pytest.mark.parametrize(
    "path",
    [
        "it's/m",
        "a,b/m",
        "c=d/m",
        "sp ace/m",
        "par(en)s/m",
        "br[0]/m",
        "c's, d=e/m",
        "$x/m",
        "back\\slash/m",
        "ä#/m",
    ],
)
def test_a_path_means_itself_whatever_is_in_it(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).mkdir(parents=True)
    for typed, key in (
        (f"model={path}", "model.name_or_path"),
        (f"workload.path={path}", "workload.path"),
        (f"hydra.run.dir={path}", "hydra.run.dir"),
    ):
        override = OverridesParser.create().parse_override(arguments([typed], CONF)[0][-1])
        assert (override.get_key_element(), override.value()) == (key, path)


def test_a_list_of_paths_is_a_sweep_over_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments(["-m", "model=a/m,b/m"], CONF)[0] == [
        "-m",
        "model=custom",
        "model.name_or_path='a/m','b/m'",
    ]
    (tmp_path / "x,y").mkdir()
    (tmp_path / "z").mkdir()
    assert arguments(["-m", "model=x,y,z"], CONF)[0] == ["-m", "model=custom", "model.name_or_path='x,y','z'"]
    assert arguments(["-m", "model=qwen3_8b,tiny"], CONF)[0] == ["-m", "model=qwen3_8b,tiny"]
    with pytest.raises(ConfigError, match="z are checkpoints and tiny are options"):
        arguments(["-m", "model=tiny,z"], CONF)


def test_what_hydra_cannot_read_is_left_for_hydra_to_refuse():
    for typed in ("scheduler=[1,2", "seed=choice(1,2", "order.weights={a: 1"):
        assert arguments([typed], CONF)[0] == [typed]


@dataclass
class Quits(Order):
    """Calls sys.exit(0) while it is built."""

    def __post_init__(self) -> None:
        sys.exit(0)

    def order(self, view):
        return view.waiting


def test_a_plugin_that_calls_exit_while_it_is_built_is_named():
    registry = Registry()
    registry.add("order", "quits", Quits)
    with pytest.raises(PluginError, match=r"order=quits called sys.exit\(0\) while it was built"):
        build_roles(registry, {"order": ("quits", {})})


def test_the_files_of_a_run_are_named_as_they_are_on_disk():
    with pytest.raises(
        ConfigError, match=r"results.files\[0\]='requests': expected .* Did you mean requests.parquet"
    ):
        ResultsConfig(["requests"])


def test_a_sweeps_folder_is_known_before_it_starts_where_the_user_names_it():
    assert arguments(["-m", "seed=1,2"], CONF) == (["-m", "seed=1,2"], None)
    given, sweep = arguments(["-m", "seed=1,2", "hydra.sweep.dir=mine"], CONF)
    assert sweep == Path("mine") and given[-1] == "hydra.sweep.dir=mine"


def test_the_flag_of_a_sweep_may_stand_anywhere():
    assert arguments(["seed=1,2", "-m", "hydra.sweep.dir=mine"], CONF)[0] == [
        "-m",
        "seed=1,2",
        "hydra.sweep.dir=mine",
    ]


def test_every_role_is_a_group():
    assert set(schema.GROUP_ROLES) | {"parallel"} == set(ROLES)
