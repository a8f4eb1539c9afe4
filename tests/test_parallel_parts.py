"""Parallelism without a second process: who holds what, what travels, and what is refused before a rank is
started."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.torch_engines import variant
from safetensors import safe_open

from headway import ConfigError, EngineConfig, Hardware, ModelConfig, ModelShape, ParallelConfig
from plugins.executors.cost import Roofline
from plugins.executors.torch import TorchExecutor
from plugins.executors.torch.config import TorchConfig
from plugins.kernels.compose import compose, lookup
from plugins.kernels.torch import TorchKernels
from plugins.models.loading import build, load, targets
from plugins.models.spec import read_model
from plugins.parallel import launch, symmetric
from plugins.parallel.config import MeshConfig
from plugins.parallel.execution import Job, RankExecution
from plugins.parallel.pipeline import cut, layers_of
from plugins.parallel.tensor import shard

ROOT = Path(__file__).parent.parent


def mesh_of(tp: int, pp: int, rank: int, layers: list[int] | None = None) -> SimpleNamespace:
    """What sharding asks of a Mesh."""
    stage, place = divmod(rank, tp)
    return SimpleNamespace(
        parallel=ParallelConfig(tp, pp, layers),
        stage=stage,
        place=place,
        is_first=stage == 0,
        is_last=stage == pp - 1,
        gathered_linear=lambda product, *args: product(*args),
        add_norm=lambda norm, *args: norm(*args),
    )


def loaded(name: str, tp: int, pp: int, rank: int, layers: list[int] | None = None):
    spec = read_model(ModelConfig(name_or_path=str(variant(name))))
    model = build(
        spec,
        compose(TorchKernels(), lookup({"torch": TorchKernels}), "cpu", "float32", spec.shape.head_dim, 16),
    )
    mesh = mesh_of(tp, pp, rank, layers)
    cut(model, mesh)
    load(model, torch.device("cpu"), shard(model, mesh))
    return model


def pieces(name: str, tp: int, pp: int) -> dict[str, list[torch.Tensor]]:
    """Checkpoint name -> what each rank that has a part of it holds, in the order of ranks."""
    found: dict[str, list[torch.Tensor]] = {}
    for rank in range(tp * pp):
        model = loaded(name, tp, pp, rank)
        parameters = dict(model.named_parameters())
        for tensor, at in targets(model).items():
            found.setdefault(tensor, []).append(parameters[at.parameter][at.first : at.first + at.shape[0]])
    return found


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [("qwen3_biases_untied", 2, 1), ("llama_rope_parameters", 4, 2), ("qwen2", 4, 1), ("qwen3", 1, 3)],
)
def test_the_parts_of_all_ranks_make_up_the_checkpoint(name, tp, pp):
    parts = pieces(name, tp, pp)
    with safe_open(variant(name) / "model.safetensors", framework="pt") as file:
        assert set(parts) == set(file.keys())
        for tensor, held in parts.items():
            whole = file.get_tensor(tensor)
            module = tensor.rpartition(".")[0]
            if len(held) == 1 or held[0].shape == whole.shape:
                assert all(torch.equal(part, whole) for part in held)  # in full wherever it is
            elif module.endswith(("o_proj", "down_proj")):
                assert torch.equal(torch.cat(held, dim=1), whole)
            else:
                copies = sum(len(part) for part in held) // len(whole)  # KV heads that several ranks hold
                assert torch.equal(torch.cat(held[::copies]), whole)


def test_a_kv_head_is_held_by_all_ranks_whose_queries_read_it():
    for rank in range(4):  # one KV head, eight query heads
        attention = loaded("qwen2", 4, 1, rank).model.layers[0].self_attn
        assert (attention.num_heads, attention.num_kv_heads) == (2, 1)


def test_a_vocabulary_that_does_not_divide_is_padded(tmp_path):
    from plugins.models.tiny import QWEN3, write_checkpoint

    write_checkpoint(tmp_path, QWEN3 | {"vocab_size": 509})
    spec = read_model(ModelConfig(name_or_path=str(tmp_path)))
    model = build(spec, compose(TorchKernels(), lookup({"torch": TorchKernels}), "cpu", "float32", 32, 16))
    load(model, torch.device("cpu"), shard(model, mesh_of(4, 1, 3)))
    weight = model.model.embed_tokens.weight
    assert weight.shape == (128, 128) and (weight[125:] == 0).all() and model.model.embed_tokens.first == 384
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert torch.equal(weight[:125], file.get_tensor("model.embed_tokens.weight")[384:])


def test_layers_are_cut_evenly_or_as_listed():
    assert [len(layers_of(ParallelConfig(pp=4), s, 64)) for s in range(4)] == [16] * 4
    assert [list(layers_of(ParallelConfig(pp=3), s, 7)) for s in range(3)] == [[0, 1], [2, 3, 4], [5, 6]]
    assert [list(layers_of(ParallelConfig(pp=2, layers=[3, 1]), s, 4)) for s in range(2)] == [[0, 1, 2], [3]]
    for count in range(4, 40):
        ranges = [layers_of(ParallelConfig(pp=4), s, count) for s in range(4)]
        assert [i for r in ranges for i in r] == list(range(count))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_each_stage_holds_only_what_it_computes():
    first, middle, last = (loaded("qwen3_biases_untied", 1, 3, rank) for rank in range(3))
    names = [{n for n, _ in model.named_parameters()} for model in (first, middle, last)]
    assert "model.embed_tokens.weight" in names[0] and "lm_head.weight" not in names[0]
    assert not {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} & names[1]
    assert {"lm_head.weight", "model.norm.weight"} <= names[2] and "model.embed_tokens.weight" not in names[2]
    assert names[1] >= {"model.layers.1.mlp.down_proj.weight"} and not any(
        ".layers.0." in n for n in names[1]
    )


def gated(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
    """A product with an activation in it: half as many columns as the weight has rows."""
    gate, up = (x @ weight.t()).unflatten(1, (-1, 2)).unbind(2)
    return gate.sigmoid() * up


class OneStream:
    """A CUDA stream where everything runs as it is called."""

    def __init__(self, device=None) -> None: ...
    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None: ...
    def record_event(self) -> None: ...


@pytest.mark.parametrize(("tp", "tokens"), [(2, 8), (4, 12), (4, 13), (3, 4)])
def test_ranks_that_write_into_each_others_memory_multiply_as_one(monkeypatch, tp, tokens):
    """Threads for ranks, on a CPU: what a GPU's peers read and write, and that one barrier a product is
    enough."""
    size, inner, rows = 6, 5 * tp, -(-tokens // tp)
    meeting = threading.Barrier(tp, timeout=20)
    memory: dict[int, torch.Tensor] = {}

    def mapped(rank, length, dtype, device):
        memory[rank] = torch.full((length,), torch.nan, dtype=dtype)
        meeting.wait()
        return memory[rank], SimpleNamespace(rank=rank, get_buffer=lambda peer, shape, dtype: memory[peer])

    monkeypatch.setattr(symmetric, "_mapped", mapped)
    monkeypatch.setattr(
        symmetric,
        "dist",
        SimpleNamespace(get_world_size=lambda rank: tp, barrier=lambda group: meeting.wait()),
    )
    monkeypatch.setattr(torch.cuda, "Stream", OneStream)
    monkeypatch.setattr(torch.cuda, "current_stream", OneStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    # Each row of `down`'s input comes from two neighbouring rows of `up`.
    up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2 * inner, size), (size, inner))
    )
    results: dict[int, torch.Tensor] = {}

    def rank(place: int) -> None:
        products = symmetric.OverlappedProducts(
            place, rows + 1, size, torch.float64, torch.device("cpu"), barrier=meeting.wait
        )
        columns = slice(place * inner // tp, (place + 1) * inner // tp)
        pairs = slice(2 * columns.start, 2 * columns.stop)
        part = torch.nn.functional.pad(x, (0, 0, 0, tp * rows - tokens))[place * rows : (place + 1) * rows]
        for _ in range(5):
            inside = products.gathered_linear(gated, part, up[pairs], None)[:tokens]
            part = products.reduced_linear(inside, down[:, columns], rows).tanh()
        results[place] = part

    threads = [threading.Thread(target=rank, args=(place,)) for place in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = x
    for _ in range(5):
        expected = (gated(expected, up, None) @ down.t()).tanh()
    assert torch.allclose(torch.cat([results[place] for place in range(tp)])[:tokens], expected, atol=1e-9)


# ---- refused before a rank is started --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 3}, "tp=3 does not divide the model's 8 attention heads"),
        ({"tp": 16}, "tp=16 does not divide the model's 8 attention heads"),
        ({"pp": 5}, "only 4 layers"),
        ({"pp": 2, "layers": [1, 2]}, "expected 2 numbers of at least 1, one a stage, that add up to 4"),
        ({"pp": 2, "layers": [4, 0]}, r"parallel.layers\[1\]=0: expected at least 1"),
        ({"pp": 2, "layers": [4, 1]}, "add up to 4"),
    ],
)
def test_what_does_not_divide_is_refused(monkeypatch, parallel, message):
    monkeypatch.setattr(launch.Ranks, "_start", lambda *args: pytest.fail("a rank was started"))
    with pytest.raises(ConfigError, match=message):
        TorchExecutor(device="cpu").prepare(
            ModelConfig(name_or_path=str(variant("qwen3"))), parallel=MeshConfig(**parallel)
        )


@pytest.mark.parametrize(
    "values",
    [
        {"tp": 0},
        {"pp": -1},
        {"timeout": 0.0},
        {"port": 70000},
        {"overlap_tokens": -1},
        {"all_reduce": "fast"},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=f"parallel.{next(iter(values))}="):
        MeshConfig(**values)


def job(**parallel) -> Job:
    return Job(
        TorchConfig(device="cpu"),
        ModelConfig(name_or_path=str(variant("qwen3"))),
        None,
        EngineConfig(),
        0,
        MeshConfig(**parallel),
    )


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "device_of", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="needs 2 GPUs on this host, torch sees 1"):
        launch.check(job(tp=2))


def test_one_gpu_for_several_ranks_is_refused():
    with pytest.raises(ConfigError, match="each takes its own GPU"):
        launch.check(replace(job(tp=2), executor=TorchConfig(device="cuda:1")))


def test_a_wrong_number_of_processes_under_torchrun_is_refused(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun started 3 processes"):
        launch.check(job(tp=2))


# ---- the simulator ---------------------------------------------------------------------------------------


def test_a_rank_without_memory_for_graphs_ends_the_run_and_names_the_flag():
    """Others have theirs, and would wait for sums of padded steps that never come."""
    rank = SimpleNamespace(mesh=SimpleNamespace(rank=1))
    with pytest.raises(
        ConfigError, match="rank 1: no memory is left to capture CUDA graphs.*kernels.cuda_graphs=false"
    ):
        RankExecution._go_without_graphs(rank)


def test_the_simulator_charges_a_rank_its_share_and_the_link():
    shape = ModelShape("Qwen3ForCausalLM", 5120, 64, 64, 8, 128, 25600, 151936, False, 40960)
    one, four = Roofline(shape, Hardware(), 1), Roofline(shape, Hardware(), 4)
    decode = [1024] * 64, [1] * 64
    reduces = (
        2
        * shape.num_hidden_layers
        * (Hardware().link_latency + 64 * 2 * 3 / 4 * shape.hidden_size * 2 / (450e9 * 0.8))
    )
    overhead = Hardware().step_overhead + shape.num_hidden_layers * Hardware().layer_overhead
    assert four.step_time(*decode) - overhead == pytest.approx(
        (one.step_time(*decode) - overhead) / 4 + reduces
    )
    assert four.kv_capacity(16, 0.9, 1.0) > 4 * one.kv_capacity(16, 0.9, 1.0)


# ---- torchrun --------------------------------------------------------------------------------------------


def test_two_agents_of_torchrun_on_one_machine_run_one_model(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agents = []
    for node in range(2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            "--rdzv-id=headway",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "run.py",
            "parallel.tp=2",
            "tracking=none",
            "executor.device=cpu",
            "executor.kv_cache_gb=0.1",
            "workload.num_requests=3",
            "workload.output_len=8",
            f"hydra.run.dir={tmp_path / str(node)}",
        ]
        agents.append(
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    printed = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert sum("3 of 3 finished" in text for text in printed) == 1  # one rank drives, the other serves
