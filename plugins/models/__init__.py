"""Model architectures: single-device code, one file each. Names of modules are those of Hugging Face
checkpoints."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from headway import ModelError, near

#: `architectures[0]` of config.json -> the module of this package that holds a class of that name.
ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "llama"}


def architecture(name: str) -> Any:
    """The model class of an architecture; imports torch. Raises ModelError for an unknown one."""
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {name!r} has no model file.{near(name, ARCHITECTURES)} A new one is one file in "
            "plugins/models"
        )
    return getattr(import_module(f".{ARCHITECTURES[name]}", __name__), name)
