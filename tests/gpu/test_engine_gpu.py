"""The whole engine on a GPU: it answers what transformers answers, with graphs and without, and its memory is
what the plan says."""

from __future__ import annotations

from functools import cache
from itertools import count

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from helpers.torch_engines import GREEDY, engine_of, generate, reference_tokens, shared_prompts, variant  # noqa: E402

from headway import Arrival, ConfigError, EngineConfig, ModelConfig, SamplingParams  # noqa: E402
from plugins.executors.torch import TorchExecutor  # noqa: E402
from plugins.executors.torch.graphs import token_sizes  # noqa: E402
from plugins.kernels.auto import AutoKernels  # noqa: E402
from plugins.kernels.compose import lookup  # noqa: E402
from plugins.kernels.torch import TorchKernels  # noqa: E402
from plugins.kernels.triton import TritonKernels  # noqa: E402

BACKENDS = {"torch": TorchKernels, "triton": TritonKernels}
PROMPTS = shared_prompts(512)
POOL = 20  # blocks of 4 tokens: the longest request needs 13, so requests preempt each other
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 128, "block_size": 4}


@cache
def on_gpu(name: str, kernels: str, graphs: bool = False, dtype: str | None = None) -> TorchExecutor:
    """A loaded model; each engine starts it with a fresh cache."""
    executor = TorchExecutor(device="cuda", kv_cache_gb=0.05)
    choice = BACKENDS[kernels](cuda_graphs=graphs)
    choice.plugin_name = kernels
    executor.prepare(
        ModelConfig(name_or_path=str(variant(name)), dtype=dtype),
        choice,
        engine=EngineConfig(**LIMITS),
        backends=lookup(BACKENDS),
    )
    return executor


def engine_on_gpu(executor, scheduler="chunked", kv="hash", **limits):
    """An engine whose KV cache is NaN wherever nobody has written."""
    engine = engine_of(executor, scheduler, kv, **{"max_model_len": 128, "num_blocks": POOL} | limits)
    for keys, values in executor.execution.runner.caches:
        keys.fill_(float("nan"))
        values.fill_(float("nan"))
    return engine


def expected(name, prompts=PROMPTS, count=GREEDY.max_tokens):
    return [reference_tokens(variant(name), tuple(p), count) for p in prompts]


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", ["qwen3", "llama3_rope"])
def test_greedy_tokens_equal_transformers(name, kernels, graphs, max_inflight):
    executor = on_gpu(name, kernels, graphs)
    for scheduler, kv in (("chunked", "hash"), ("fcfs", "none"), ("pd_split", "radix")):
        engine = engine_on_gpu(
            executor, scheduler, kv, chunk=64 if scheduler == "fcfs" else 7, max_inflight=max_inflight
        )
        assert generate(engine, PROMPTS) == expected(name)
        assert engine.roster.num_preemptions > 0


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("kernels", BACKENDS)
def test_tables_and_lengths_on_the_device_are_those_of_the_plan(kernels, graphs, monkeypatch):
    """The KV oracle of the real engine: after each launch every row holds its request's blocks, and nobody's
    block is in two places."""
    executor = on_gpu("qwen3", kernels, graphs)
    engine = engine_on_gpu(executor, kv="radix", chunk=7, max_inflight=2)
    launch, steps = executor.launch, []

    def checked(plan):
        ticket = launch(plan)
        runner, rows = executor.execution.runner, executor.execution.batcher._row_of
        tables, lengths = runner.block_tables.cpu(), runner.lengths.cpu()
        for request, start, length in zip(plan.requests, plan.starts, plan.lengths, strict=True):
            row = rows[request.index]
            assert tables[row, : len(request.block_table)].tolist() == request.block_table
            assert lengths[row] == start + length
        held = [rows[request.index] for request in engine.running.items if request.index in rows]
        assert len(set(held)) == len(held)
        # padding still points to the reserved block
        assert lengths[-1] == 0 and (tables[-1] == engine.pool.num_blocks).all()
        for request, start, length in zip(plan.requests, plan.starts, plan.lengths, strict=True):
            keys, values = executor.execution.runner.caches[0]
            slots = [request.block_table[p // 4] * 4 + p % 4 for p in range(start + length)]
            for cached in (keys, values):
                assert (
                    not cached.view(-1, *cached.shape[2:])[torch.tensor(slots, device="cuda")].isnan().any()
                )
        steps.append(plan.step)
        return ticket

    monkeypatch.setattr(executor, "launch", checked)
    assert generate(engine, PROMPTS) == expected("qwen3")
    assert len(steps) > 20


EDGES = [size + off for size in token_sizes(LIMITS["max_num_batched_tokens"]) for off in (-1, 0, 1)]


@pytest.mark.parametrize("budget", sorted({edge for edge in EDGES if 8 < edge <= 128}))
def test_steps_with_prompts_answer_the_same_at_every_edge_of_a_graph(budget):
    """Steps of exactly `budget` tokens: whole prompts and a chunk, under preemption and prefix hits."""
    engine = engine_on_gpu(on_gpu("qwen3", "triton", True), "fcfs", "radix", chunk=budget, max_inflight=2)
    assert generate(engine, PROMPTS) == expected("qwen3")
    assert engine.roster.num_preemptions > 0


def test_padding_of_a_step_with_prompts_is_written_nowhere():
    executor = on_gpu("qwen3", "triton", True)
    engine = engine_on_gpu(executor, num_blocks=128)
    generate(engine, PROMPTS[:3], SamplingParams(temperature=0, max_tokens=1))  # no step is a decode
    reserved = engine.pool.num_blocks
    assert executor.execution.runner.mixed_graphs is not None
    for keys, values in executor.execution.runner.caches:
        assert keys[reserved].isnan().all() and values[reserved].isnan().all()


NEW_SIZES = count(40, 8)  # of rows that no kernel was compiled for in this process


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_compiled_or_captured_after_the_start(graphs, dtype):
    executor = on_gpu("qwen3", "triton", graphs, dtype)
    engine = engine_on_gpu(executor, num_blocks=128, chunk=7, max_inflight=2)
    for kind in SAMPLINGS.values():
        generate(engine, PROMPTS, kind)
    assert executor.execution.late_preparations == 0
    size = next(NEW_SIZES)
    executor.execution.kernels.rms_norm(
        torch.ones((3, size), device="cuda"), torch.ones(size, device="cuda"), 1e-6
    )
    assert executor.execution.late_preparations > 0


def test_without_memory_to_capture_steps_run_without_graphs(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr("plugins.executors.torch.execution.MixedGraphs", full)
    executor = on_gpu("qwen3", "triton", True)
    engine = engine_on_gpu(executor, num_blocks=128)
    assert executor.execution.runner.mixed_graphs is None
    assert generate(engine, PROMPTS) == expected("qwen3")
    assert "kernels.cuda_graphs=false" in capsys.readouterr().err


def test_auto_kernels_are_the_fastest_that_are_there(capsys):
    executor = TorchExecutor(device="cuda", kv_cache_gb=0.05)
    backends = lookup(BACKENDS)  # no FlashAttention among them
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))),
        AutoKernels(),
        engine=EngineConfig(**LIMITS),
        backends=backends,
    )
    kernels = executor.execution.kernels
    assert kernels.cuda_graphs and set(kernels.chosen.values()) == {"triton"}
    assert "no flash_attn" in str(kernels) and "kernels: triton" in capsys.readouterr().err
    assert executor.caps.default_inflight == 2 and executor.caps.default_token_budget >= 1024


SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    "random": SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True),
    "filtered": SamplingParams(
        temperature=1.1, top_k=50, top_p=0.9, min_p=0.01, seed=7, max_tokens=24, ignore_eos=True
    ),
}


@pytest.mark.parametrize(
    ("kernels", "dtype"), [("torch", "float32"), ("triton", "float32"), ("triton", "bfloat16")]
)
def test_graphs_change_nothing(kernels, dtype):
    """Every batch size from 1 to 8, as requests of different lengths end; with mixed sampling too.

    A graph pads 5 rows to 8, and libraries choose a product by its number of rows; `torch`'s attention pads
    to the longest context that may come. Both round differently in the last bit, which in bfloat16 is much:
    there all requests are as long, and `torch` is left out."""
    kinds = [*SAMPLINGS.values()]
    length = (lambda i: 4 + 5 * i) if dtype == "float32" else (lambda i: 24)

    def tokens(graphs, pick):
        engine = engine_on_gpu(on_gpu("qwen3", kernels, graphs, dtype), num_blocks=128, max_inflight=2)
        arrivals = [
            Arrival(0.0, prompt, SamplingParams(**{**fields(pick(i)), "max_tokens": length(i)}), id=f"p{i}")
            for i, prompt in enumerate(PROMPTS)
        ]
        return [o.output_token_ids for o in engine.run(arrivals).outputs]

    for pick in (*(lambda i, k=kind: k for kind in kinds), lambda i: kinds[i % 3]):
        assert tokens(True, pick) == tokens(False, pick)


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_triton_samples_what_torch_samples(kind):
    """Chance is a function of seed, position and token, on every backend; rows in one batch differ in what
    they ask for."""

    def tokens(kernels):
        engine = engine_on_gpu(on_gpu("qwen3", kernels, kernels == "triton"), num_blocks=128, max_inflight=2)
        arrivals = [
            Arrival(0.0, prompt, SamplingParams(**{**fields(SAMPLINGS[kind]), "seed": i}), id=f"p{i}")
            for i, prompt in enumerate(PROMPTS)
        ]
        return [o.output_token_ids for o in engine.run(arrivals).outputs]

    assert tokens("triton") == tokens("torch")


def fields(sampling):
    return {name: getattr(sampling, name) for name in SamplingParams.__dataclass_fields__}


def first_logprobs(executor, prompts):
    engine = engine_on_gpu(executor, num_blocks=256)
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=8, ignore_eos=True)
    return [o.logprobs[0] for o in engine.run([Arrival(0.0, p, sampling) for p in prompts]).outputs]


@pytest.mark.parametrize("name", ["qwen3", "llama3_rope"])
def test_bfloat16_log_probabilities_stay_near_float32(name):
    """Of the 8 most likely tokens after each prompt: 0.1 at most, 0.03 in the mean (bfloat16 keeps 8 bits;
    logits here are up to about 4)."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(512, (n,), generator=generator).tolist() for n in range(3, 100, 5)]
    wide, narrow = (
        first_logprobs(on_gpu(name, "triton", False, dtype), prompts) for dtype in ("float32", "bfloat16")
    )
    errors = [
        abs(p - n.best[token])
        for w, n in zip(wide, narrow, strict=True)
        for token, p in w.best.items()
        if token in n.best
    ]
    assert len(errors) > 6 * len(prompts)
    assert max(errors) < 0.1 and sum(errors) / len(errors) < 0.03


def test_decode_reads_no_length_on_the_host():
    """A step of decodes enqueues everything without waiting for the device."""
    executor = on_gpu("qwen3", "triton", True)
    engine = engine_on_gpu(executor, num_blocks=128, max_inflight=2)
    generate(engine, PROMPTS[:4])
    runner = executor.execution.runner
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.batch_rows.fill_(runner.max_num_seqs)
        runner.decode_step(3, 64, 0, -1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kv_capacity_fits_into_the_share_of_memory_that_was_asked_for(capsys):
    executor = TorchExecutor(device="cuda", gpu_memory_utilization=0.3)
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))),
        engine=EngineConfig(**LIMITS),
        backends=lookup(BACKENDS),
    )
    blocks = executor.kv_capacity(4)
    total = torch.cuda.get_device_properties(0).total_memory
    per_block = 4 * executor.execution.spec.shape.kv_bytes_per_token
    assert 0.2 * total < (blocks + 1) * per_block <= 0.3 * total
    assert f"{blocks}" in capsys.readouterr().err.replace(",", "")  # it is printed


def test_more_cache_than_the_gpu_has_is_refused():
    executor = TorchExecutor(device="cuda", kv_cache_gb=16_000)
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))),
        engine=EngineConfig(**LIMITS),
        backends=lookup(BACKENDS),
    )
    with pytest.raises(ConfigError, match="lower engine.num_blocks"):
        engine_of(executor, num_blocks=None)


def test_out_of_memory_while_profiling_says_what_to_lower():
    engine = EngineConfig(max_num_batched_tokens=1 << 20, max_num_seqs=1 << 16, max_model_len=4096)
    executor = TorchExecutor(device="cuda")
    executor.prepare(
        ModelConfig(name_or_path=str(variant("qwen3"))), engine=engine, backends=lookup(BACKENDS)
    )
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(ConfigError, match="max_num_batched_tokens"):
            executor.kv_capacity(16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_graph_for_every_batch_size_is_kept():
    runner = on_gpu("qwen3", "triton", True).execution
    engine_on_gpu(on_gpu("qwen3", "triton", True))
    covered = runner.runner.decode_step.__self__
    assert set(covered._graphs) == {
        (n, kind) for n in range(1, runner.runner.max_num_seqs + 1) for kind in range(3)
    }
    assert len({id(graph) for graph, _ in covered._graphs.values()}) == 3 * len(covered._sizes)
