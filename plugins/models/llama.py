"""Llama and what differs from it in numbers and biases only: SmolLM2 (a Llama), Qwen2 (biases on q, k, v; see
`spec.py`)."""

from __future__ import annotations

from .layers import CausalLM


class LlamaForCausalLM(CausalLM):
    pass


class Qwen2ForCausalLM(CausalLM):
    pass
