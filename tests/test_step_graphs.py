"""What steps as CUDA graphs are made of, where no GPU is needed: sizes, padding, the choice of kernels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.torch_engines import engine_of
from hypothesis import given
from hypothesis import strategies as st

from headway import Arrival, ConfigError, EngineConfig, ModelConfig, SamplingParams
from plugins.executors.torch import TorchExecutor
from plugins.executors.torch.batch import PARAMETERS, StepInput
from plugins.executors.torch.graphs import longest_mixed, token_sizes
from plugins.executors.torch.warmup import warm_up
from plugins.kernels.auto import AutoKernels
from plugins.kernels.compose import compose, lookup
from plugins.kernels.flash_attn import FlashAttnKernels
from plugins.kernels.torch import TorchKernels
from plugins.kernels.triton import TritonKernels

# ---- sizes ------------------------------------------------------------------------------------------------


@given(st.integers(1, 9000))
def test_padding_is_at_most_an_eighth_from_64_tokens_on(largest):
    sizes = token_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest
    for below, size in zip(sizes, sizes[1:], strict=False):
        assert size - below <= 16 or size - (below + 1) <= size / 8


def test_a_step_gets_a_graph_until_its_work_hides_its_launch():
    parameters = 193_000_000  # of a layer of Qwen3-8B's
    assert 1024 < longest_mixed(parameters, 8192) < 4096
    assert longest_mixed(parameters // 16, 8192) == 8192  # a small model's launch is never hidden
    assert longest_mixed(parameters, 100) == 100


# ---- padding ---------------------------------------------------------------------------------------------

chunks = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9), st.booleans()), min_size=1, max_size=6)


@given(chunks, st.integers(0, 3), st.integers(0, 2), st.integers(0, 4), st.integers(0, 20))
def test_a_padded_step_is_the_step_and_tokens_of_nobody(batch, updates, admitted, more_seqs, more_tokens):
    starts, lengths, sampling = (list(column) for column in zip(*batch, strict=True))
    rows, samples = list(range(10, 10 + len(batch))), [i for i, sample in enumerate(sampling) if sample]
    bounds = np.cumsum([0, *lengths]).tolist()
    total = bounds[-1]
    tokens, owners = list(range(100, 100 + total)), np.repeat(range(len(batch)), lengths).tolist()
    told = list(range(1000, 1000 + 2 * updates + admitted * (1 + PARAMETERS)))
    data = np.array([*told, *samples, *rows, *starts, *bounds, *tokens, *owners], dtype=np.int32)
    step = StepInput(
        data=data,
        decode=False,
        same_rows=False,
        num_seqs=len(batch),
        num_tokens=total,
        num_samples=len(samples),
        num_updates=updates,
        num_admitted=admitted,
        max_query=max(lengths),
        max_context=99,
        sampling=0,
        logprobs=-1,
        sampled=samples,
    )
    seqs, size = len(batch) + more_seqs, total + (more_tokens if more_seqs else 0)
    at = np.cumsum((len(told), 77, seqs, seqs, seqs + 1, size))
    parts = np.split(step.padded(seqs, size, padding_row=77), at)
    heard, chosen, all_rows, all_starts, all_bounds, all_tokens, all_owners = (
        part.tolist() for part in parts
    )
    assert step.num_told == len(told) and heard == told
    assert chosen == samples + [seqs - 1] * (77 - len(samples))
    n = len(batch)
    assert (all_rows[:n], all_starts[:n], all_bounds[: n + 1], all_tokens[:total], all_owners[:total]) == (
        rows,
        starts,
        bounds,
        tokens,
        owners,
    )
    assert set(all_rows[n:]) <= {77} and set(all_bounds[n:]) == {total}  # sequences of padding have no token
    assert set(all_owners[total:]) <= {seqs - 1}


def test_a_padded_step_computes_what_the_step_does():
    """On a CPU, where a store of slot -1 is left out by hand: hidden states of real tokens do not depend on
    padding."""
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(), TorchKernels())
    execution = executor.execution
    execution.start(8, 16, 4, 64, 128, 2, 0)
    runner = execution.runner
    runner.block_tables[0, :2] = torch.tensor([3, 5])
    stored = []
    for layer in execution.model.model.layers:
        store = layer.self_attn._store

        def kept(qkv, *rest, store=store):
            *middle, slots, heads, kv_heads = rest
            stored.append(slots.clone())
            return store(
                qkv, *middle, torch.where(slots < 0, runner.block_tables.max() * 16, slots), heads, kv_heads
            )

        layer.self_attn._store = kept
    ids = [5, 6, 7]

    def hidden(seqs, tokens):
        batch = torch.zeros(3 * seqs + 1 + 2 * tokens, dtype=torch.int64)
        rows, starts, bounds, known, owners = batch.split((seqs, seqs, seqs + 1, tokens, tokens))
        rows[:], bounds[1:], owners[:] = 4, 3, seqs - 1
        rows[0], owners[:3], known[:3] = 0, 0, torch.tensor(ids)
        with torch.inference_mode():
            return runner.mixed_hidden(seqs, tokens, batch, 3, 3)

    plain, _, ends, last = hidden(1, 3)
    padded, rows, ends_of_all, last_of_all = hidden(3, 8)
    torch.testing.assert_close(padded[:3], plain)
    assert ends.tolist() == [3] and ends_of_all.tolist() == [3, 0, 0] and last[0] == last_of_all[0] == 2
    assert stored[-1].tolist() == [48, 49, 50, -1, -1, -1, -1, -1] and runner.lengths.tolist() == [
        3,
        0,
        0,
        0,
        0,
    ]


# ---- kernels=auto ----------------------------------------------------------------------------------------


class Installed(FlashAttnKernels):
    """FlashAttention as if its package were there."""

    def operations(self, device):
        return SimpleNamespace(attention="its attention")


BACKENDS = {"torch": TorchKernels, "triton": TritonKernels, "flash_attn": Installed}


def settled(choice, device="cuda", dtype="bfloat16", head_size=128, block_size=16, backends=BACKENDS):
    return choice.settled(lookup(backends), device, dtype, head_size, block_size)


def test_auto_takes_flash_attention_for_prompts_and_triton_for_the_rest_and_says_why():
    pytest.importorskip("triton")
    choice, left_out, reasons = settled(AutoKernels())
    assert (choice.attention, choice.decode, choice.linear, choice.sampling, choice.cuda_graphs) == (
        "flash_attn",
        "triton",
        "triton",
        "triton",
        True,
    )
    assert left_out == []
    assert reasons == [
        "attention: flash_attn, ahead of triton in prompts",
        "decode: triton, ahead of flash_attn in decodes",
        "linear, norm, rope, activation, store, sampling, batch: triton, faster than plain torch",
    ]


@pytest.mark.parametrize(
    ("place", "attention", "note"),
    [
        (
            {"dtype": "float32"},
            "triton",
            "no flash_attn: kernels: 'flash_attn' supports bfloat16, float16, not float32",
        ),
        (
            {"block_size": 8},
            "triton",
            "no flash_attn: kernels: 'flash_attn' needs block sizes that are multiples of 16, not 8",
        ),
        ({"head_size": 16}, "triton", "no flash_attn: kernels: 'flash_attn' supports head sizes"),
        ({"head_size": 100}, "torch", "no triton: kernels: 'triton' supports head sizes"),
        (
            {"dtype": "float64"},
            "torch",
            "no triton: kernels: 'triton' supports bfloat16, float16, float32, not float64",
        ),
    ],
)
def test_auto_leaves_out_what_cannot_run_and_says_why(place, attention, note):
    pytest.importorskip("triton")
    choice, left_out, reasons = settled(AutoKernels(), **place)
    assert choice.attention == attention and choice.decode is None
    assert choice.cuda_graphs is (attention == "triton")
    assert any(text.startswith(note) for text in left_out)
    assert any(text.startswith("attention, decode,") and f": {attention}, " in text for text in reasons)


class Missing(TritonKernels):
    """Triton as if its package were not there."""

    def operations(self, device):
        raise ConfigError("the package triton is not installed")


class Broken(FlashAttnKernels):
    """FlashAttention built for another torch."""

    def operations(self, device):
        raise ImportError("undefined symbol: planted")


def test_without_triton_flash_attention_takes_decodes_too_and_the_run_says_so():
    kernels = compose(AutoKernels(), lookup(BACKENDS | {"triton": Missing}), "cuda", "bfloat16", 128, 16)
    assert kernels.chosen["attention"] == "flash_attn" and "decode" not in kernels.chosen
    assert kernels.attention == "its attention"
    assert {kernels.chosen[operation] for operation in ("linear", "rms_norm", "rotary", "sample")} == {
        "torch"
    }
    assert str(kernels).splitlines() == [
        "flash_attn (attention), torch (linear, norm, rope, activation, store, sampling, batch), no CUDA "
        "graphs",
        "  attention, decode: flash_attn, ahead of plain torch",
        "  linear, norm, rope, activation, store, sampling, batch: torch, nothing faster can run",
        "  no CUDA graphs: without triton only decodes can be captured; kernels.cuda_graphs=true does so",
        "  no triton: the package triton is not installed",
    ]


def test_a_package_that_cannot_be_imported_is_left_out_with_its_error():
    pytest.importorskip("triton")
    choice, left_out, _ = settled(AutoKernels(), backends=BACKENDS | {"flash_attn": Broken})
    assert choice.attention == "triton"
    assert left_out == ["no flash_attn: it is installed and cannot be imported (undefined symbol: planted)"]


def test_with_nothing_installed_a_gpu_runs_plain_torch_and_the_run_names_both():
    kernels = compose(
        AutoKernels(),
        lookup(BACKENDS | {"triton": Missing, "flash_attn": Broken}),
        "cuda",
        "bfloat16",
        128,
        16,
    )
    assert set(kernels.chosen.values()) - {"separate"} == {"torch"}
    assert [text.partition(":")[0] for text in kernels.left_out] == ["no triton", "no flash_attn"]


def test_what_is_given_to_auto_is_used_as_it_is():
    pytest.importorskip("triton")
    choice, _, reasons = settled(AutoKernels(attention="triton", cuda_graphs=False))
    assert (choice.attention, choice.decode, choice.norm, choice.cuda_graphs) == (
        "triton",
        None,
        "triton",
        False,
    )
    assert reasons[1:] == ["attention: triton, as given", "cuda_graphs: False, as given"]
    choice, _, reasons = settled(AutoKernels(decode="flash_attn"))
    assert (choice.attention, choice.decode) == ("flash_attn", None)
    assert "decode: flash_attn, as given" in reasons


def test_auto_on_a_cpu_is_plain_torch_and_leaves_nothing_out():
    kernels = compose(AutoKernels(), lookup(BACKENDS), "cpu", "float32", 64, 16)
    assert set(kernels.chosen.values()) == {"torch"} | ({"separate"} & set(kernels.chosen.values()))
    assert not kernels.cuda_graphs and kernels.left_out == []
    assert kernels.reasons == ["plain torch for everything: the model runs on cpu"]


# ---- the warm-up -----------------------------------------------------------------------------------------


class Listed(SimpleNamespace):
    """Kernels that note which of their operations are called."""


def listed(kernels, called: set[str]) -> Listed:
    def noting(name, operation):
        def call(*args, **options):
            called.add(name)
            return operation(*args, **options)

        return call

    operations = {name: value for name, value in vars(kernels).items() if callable(value)}
    return Listed(
        **(vars(kernels) | {name: noting(name, operation) for name, operation in operations.items()})
    )


def used(work) -> set[str]:
    """The operations that a runner calls in `work(executor)`, beside those that the model's layers call."""
    executor = TorchExecutor(device="cpu", kv_cache_gb=0.01)
    executor.prepare(ModelConfig(), TorchKernels(), engine=EngineConfig(block_size=16))
    executor.execution.start(8, 16, 4, 64, 128, 2, 0)
    called: set[str] = set()
    executor.execution.runner.kernels = listed(executor.execution.kernels, called)
    work(executor)
    return called


def test_every_operation_that_a_step_launches_is_launched_in_the_warm_up():
    def run(executor):
        engine = engine_of(executor, num_blocks=8, block_size=16)
        executor.execution.runner.kernels = listed(executor.execution.kernels, seen)
        engine.run([Arrival(0.0, [1, 2, 3], SamplingParams(max_tokens=4, temperature=0.7, top_k=3))])

    seen: set[str] = set()
    used(run)
    assert {"update_rows", "decode_inputs", "advance", "sample"} <= seen
    assert seen <= used(lambda executor: warm_up(executor.execution.runner, [1, 4], []))


def test_the_warm_up_changes_nothing_that_a_request_has():
    def state(runner):
        return [
            t.clone()
            for t in (runner.block_tables, runner.numbers, runner.top_k, runner.seeds, runner.lengths)
        ]

    def work(executor):
        runner = executor.execution.runner
        before = state(runner)
        warm_up(runner, [1, 4], [])
        assert all(torch.equal(a, b) for a, b in zip(before, state(runner), strict=True))

    used(work)
