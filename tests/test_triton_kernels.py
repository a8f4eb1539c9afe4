"""The Triton kernels on the CPU, and which compositions of kernels are refused before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from headway import ConfigError
from plugins.kernels.compose import FUSED, GROUPS, compose, lookup
from plugins.kernels.flash_attn import FlashAttnKernels
from plugins.kernels.torch import TorchKernels
from plugins.kernels.triton import TritonKernels

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_agree_with_float64_in_tritons_interpreter():
    """tests/gpu/test_kernels_gpu.py at its CPU sizes. In a process of its own: Triton reads TRITON_INTERPRET
    when it is first imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_kernels_gpu.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


class Anywhere(TritonKernels):
    """Triton's capabilities on the CPU, with torch's callables: composition without a GPU."""

    caps = replace(TritonKernels.caps, devices=frozenset(("cpu", "cuda")))

    def operations(self, device):
        plain = TorchKernels().operations(device)
        return SimpleNamespace(**{op: getattr(plain, op, op) for op in self.caps.ops})


class NoGraphs(Anywhere):
    caps = replace(Anywhere.caps, graph_safe=False)


class OnlyNorms(Anywhere):
    caps = replace(Anywhere.caps, ops=frozenset(("rms_norm", "add_rms_norm")))


BACKENDS = lookup(
    {
        "torch": TorchKernels,
        "triton": Anywhere,
        "flash_attn": FlashAttnKernels,
        "no_graphs": NoGraphs,
        "only_norms": OnlyNorms,
    }
)


def composed(choice, device="cpu", dtype="float32", head_size=64, block_size=16):
    return compose(choice, BACKENDS, device, dtype, head_size, block_size)


def test_each_group_of_operations_names_its_backend():
    kernels = composed(TorchKernels(norm="triton"))
    assert kernels.chosen["rms_norm"] == kernels.chosen["add_rms_norm"] == "triton"
    assert {kernels.chosen[op] for group, ops in GROUPS.items() for op in ops if group != "norm"} == {"torch"}


FIELDS = {
    "qk_norm_rope_store": ("norm", "rope", "store"),
    "gated_linear": ("linear", "activation"),
    "linear_parts": ("linear", "norm"),
    "sample_part": ("sampling",),
}


@pytest.mark.parametrize("fused", FUSED)
def test_a_fused_operation_is_used_only_when_one_backend_does_all_of_it(fused):
    everywhere = dict.fromkeys(FIELDS[fused], "triton")
    assert composed(TorchKernels(**everywhere)).chosen[fused] == "triton"
    for field in FIELDS[fused]:
        assert composed(TorchKernels(**everywhere | {field: "torch"})).chosen[fused] != "triton"


def test_a_product_with_its_activation_out_of_its_parts_is_the_same():
    torch = pytest.importorskip("torch")
    x, weight = torch.randn(3, 8), torch.randn(12, 8)
    gate, up = (x @ weight.T).chunk(2, -1)
    torch.testing.assert_close(
        composed(TorchKernels()).gated_linear(x, weight, None), torch.nn.functional.silu(gate) * up
    )


def test_the_fused_operation_out_of_its_parts_is_the_same():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    arguments = (
        torch.randn(5, 8 * 16),
        torch.randn(16),
        torch.randn(16),
        1e-6,
        torch.arange(5),
        torch.randn(9, 16),
    )
    results = []
    for choice in (TorchKernels(), TorchKernels(norm="triton")):
        caches = torch.zeros(2, 4, 2, 16), torch.zeros(2, 4, 2, 16)
        q = composed(choice).qk_norm_rope_store(*arguments, *caches, torch.tensor([7, 0, 3, 2, 5]), 4, 2)
        results.append((q, *caches))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_backend_may_run_everything():
    kernels = composed(TorchKernels(decode="triton", **dict.fromkeys(GROUPS, "triton")))
    assert set(kernels.chosen.values()) == {"triton"}
    assert kernels.caps.ops == Anywhere.caps.ops


def test_an_operation_that_a_backend_lacks_comes_from_torch():
    kernels = composed(TorchKernels(norm="only_norms", activation="only_norms"))
    assert (kernels.chosen["rms_norm"], kernels.chosen["silu_and_mul"]) == ("only_norms", "torch")


@pytest.mark.parametrize(
    "choice, where, reason",
    [
        (TritonKernels(), {}, "'triton' runs on cuda, not on cpu. Set kernels=torch"),
        (
            TorchKernels(attention="triton"),
            {"head_size": 72},
            "head sizes .*128.*, the model has 72. Set kernels.attention",
        ),
        (
            TorchKernels(attention="triton"),
            {"dtype": "float64"},
            "supports bfloat16, float16, float32, not float64",
        ),
        (TorchKernels(attention="flash_attn"), {}, "flash_attn"),
        (TorchKernels(attention="tritn"), {}, "no backend is called 'tritn'. Did you mean triton"),
        (
            TorchKernels(norm="no_graphs", cuda_graphs=True),
            {},
            "cuda_graphs=true: no_graphs cannot be captured",
        ),
    ],
    ids=["device", "head size", "dtype", "package", "name", "graphs"],
)
def test_what_cannot_run_is_refused_with_the_reason(choice, where, reason):
    with pytest.raises(ConfigError, match=reason):
        composed(choice, **where)


def test_flash_attention_names_its_package_block_sizes_and_dtypes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match="neither flash_attn_interface .* nor flash_attn is installed. `pip install flash-attn",
    ):
        composed(FlashAttnKernels(), device="cuda", dtype="bfloat16", block_size=256)
    monkeypatch.setattr(FlashAttnKernels, "operations", lambda self, device: None)
    with pytest.raises(
        ConfigError,
        match="block sizes that are multiples of 16, not 24. Set block_size=32, or kernels.attention=triton",
    ):
        composed(TorchKernels(attention="flash_attn"), device="cuda", dtype="bfloat16", block_size=24)
    with pytest.raises(ConfigError, match="'flash_attn' supports bfloat16, float16, not float32"):
        composed(TorchKernels(attention="flash_attn"), device="cuda", dtype="float32", block_size=256)
