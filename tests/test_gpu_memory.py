"""What a GPU that is too small, or too full, is answered with; the GPU is a stand-in here."""

from __future__ import annotations

import pytest
import torch
from helpers.torch_engines import prepared, variant

from headway import ConfigError, EngineConfig
from plugins.executors.torch import memory
from plugins.models import loading

GPU = torch.device("cuda", 0)
GIB = 2**30


@pytest.fixture
def model(monkeypatch):
    """A loaded model, and a GPU of 10 GiB of which 4 are free."""
    for name, answer in {
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "memory_reserved": 1 * GIB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (4 * GIB, 10 * GIB))
    return prepared(variant("qwen3")).execution.model


def free(monkeypatch, model, peak, utilization):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: peak)
    monkeypatch.setattr(memory, "_largest_step", lambda *_: None)
    return memory.kv_bytes_free(model, None, GPU, EngineConfig(), utilization)


def test_the_cache_takes_what_weights_and_the_largest_step_leave(monkeypatch, model):
    assert free(monkeypatch, model, peak=3 * GIB, utilization=0.9) == (9 - 6 - 2) * GIB


def test_no_room_for_a_block_is_refused(monkeypatch, model):
    with pytest.raises(
        ConfigError, match=r"10.0 GiB x 0.5 less 6.0 GiB in use.*Raise executor.gpu_memory_utilization"
    ):
        free(monkeypatch, model, peak=3 * GIB, utilization=0.5)


def test_a_step_that_does_not_fit_is_refused(monkeypatch, model):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(memory, "_largest_step", full)
    with pytest.raises(
        ConfigError,
        match=r"out of memory in a step of 8192 tokens and 256 requests.*lower engine.max_num_batched_tokens",
    ):
        memory.kv_bytes_free(model, None, GPU, EngineConfig(), 0.9)


def test_weights_larger_than_the_gpu_are_refused_before_they_are_read(monkeypatch, model):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 10 * GIB))
    with pytest.raises(
        ConfigError,
        match=r"the weights take .* free: set a smaller model, model.dtype=bfloat16, or more GPUs",
    ):
        loading._check_memory(model, GPU)
