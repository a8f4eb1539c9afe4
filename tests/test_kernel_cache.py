"""Triton keeps compiled kernels on disk, under keys that must be the same in every process: what would change
them is found here."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Prints a line for each key: of every kernel and device function, and of those that are given a function as
#: a constant.
KEYS = """
import importlib, pkgutil
import triton
from triton.compiler import ASTSource
from triton.runtime import JITFunction
import plugins.kernels.triton as package

found = {}
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    members = vars(importlib.import_module(module.name))
    found |= {f"{v.fn.__module__}.{v.fn.__name__}": v for v in members.values() if isinstance(v, JITFunction)}
for name, function in sorted(found.items()):
    print(name, function.cache_key)
from plugins.kernels.triton import plan, sampling
for kernel, constant, values in (
    (plan._plan_kernel, "tiles_of", (plan.decode_tiles, plan.prompt_tiles)),
    (sampling._best_of_chunk_kernel, "minus_log2", (sampling._minus_log2, sampling._fast_minus_log2)),
):
    for value in values:
        print(kernel.fn.__name__, value.fn.__name__, ASTSource(kernel, {}, {constant: value}).hash())
print("planted", ASTSource(plan._plan_kernel, {}, {"tiles_of": lambda: None}).hash())
"""


@cache
def keys(hash_seed: int) -> list[str]:
    """The last one is of a constant whose text is its address."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONHASHSEED": str(hash_seed)
    }
    # As many objects as the seed says come before the import, so that nothing lies at the same address twice.
    script = f"ballast = [bytearray(4096) for _ in range({hash_seed * 1000})]\n{KEYS}"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def test_every_process_finds_the_kernels_that_another_has_compiled():
    pytest.importorskip("triton")
    first, second = keys(1)[:-1], keys(2)[:-1]
    assert first == second
    names = [line.split()[0] for line in first]
    assert len(names) > 20 and "plugins.kernels.triton.decode.decode_kernel" in names
    assert len(set(first)) == len(first)


def test_a_constant_that_is_another_in_every_process_would_be_noticed():
    pytest.importorskip("triton")
    first, second = (keys(seed)[-1] for seed in (1, 2))
    assert first.startswith("planted") and first != second
