"""Random combinations of config fields and file layouts against transformers: `python -m
tests.helpers.checkpoint_differences --count 300`.

What `test_checkpoint_matrix.py` checks one by one, crossed by chance; minutes, so not in the suite. Prints
every case where Headway answers other than transformers, answers where transformers refuses, or raises
anything but a ModelError.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_checkpoint_matrix as matrix
import torch
from test_checkpoint_matrix import ABSENT, BASES, LLAMA3, YARN, Case, ours, reference, write

from headway import ModelError

FIELDS: dict[str, tuple[Any, ...]] = {
    "rope_theta": (500.0, 1e6, 10, ABSENT, None, 1, 0.5, 1e12),
    "rope_scaling": (
        None,
        {},
        {"type": "linear", "factor": 2},
        {"rope_type": "linear", "factor": 0.5},
        {"type": "dynamic", "factor": 4.0},
        {"factor": 2.0},
        {"rope_type": "default", "rope_theta": 77.0},
        {"rope_type": "linear", "type": "yarn", "factor": 3.0},
        {"type": "mrope"},
        LLAMA3,
        LLAMA3 | {"rope_theta": 99.0},
        LLAMA3 | {"factor": 1},
        LLAMA3 | {"original_max_position_embeddings": None},
        LLAMA3 | {"high_freq_factor": 1.0},
        LLAMA3 | {"low_freq_factor": 8.0},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        YARN,
        YARN | {"truncate": False},
        YARN | {"beta_fast": None, "beta_slow": None},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        YARN | {"mscale": 0.7},
        YARN | {"attention_factor": 0.8},
        YARN | {"partial_rotary_factor": 1.0},
        {"rope_type": "yarn", "factor": 2.0},
    ),
    "rope_parameters": (
        None,
        {},
        {"rope_type": "default", "rope_theta": 321.0},
        {"rope_theta": None},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000},
        LLAMA3,
        YARN | {"rope_theta": 300.0},
    ),
    "original_max_position_embeddings": (64, 256, None),
    "partial_rotary_factor": (1.0, 0.5, None),
    "head_dim": (8, 16, 12, 20, None, ABSENT),
    "num_key_value_heads": (1, 2, 4, 3, None, ABSENT),
    "num_hidden_layers": (1, 2, 3),
    "tie_word_embeddings": (True, False, ABSENT),
    "attention_bias": (True, False, ABSENT),
    "mlp_bias": (True, False, ABSENT),
    "use_sliding_window": (True, False),
    "sliding_window": (None, 4, 512, 4096, 0, -3),
    "max_window_layers": (0, 1, 2, 28, -1),
    "layer_types": (
        None,
        ["full_attention"] * 2,
        ["attention"] * 2,
        ["sliding_attention", "full_attention"],
        ["full_attention"],
    ),
    "attention_chunk_size": (None, 8),
    "is_causal": (True, False),
    "rms_norm_eps": (1e-6, 0.1, 1e-12, ABSENT),
    "max_position_embeddings": (64, 128, 2048, ABSENT),
    "hidden_act": ("silu", "swish", "relu", ABSENT),
    "architectures": (None, [], ["LlamaModel"], ["Qwen3ForCausalLM"], ABSENT),
    "dtype": ("float32", "bfloat16", None, ABSENT),
    "pad_token_id": (0, 98, -1, None, 99, 200),
    "pretraining_tp": (1, 4),
}
FILES = (
    None,
    None,
    None,
    matrix.another_head,
    matrix.the_same_head,
    matrix.head_alone,
    matrix.stray_files,
    matrix.stale_shards,
    matrix.mixed,
    matrix.cast(torch.bfloat16),
    matrix.cast(torch.float16),
    matrix.with_old_buffers,
    matrix.change(lambda n, t: (n.removeprefix("model."), t)),
    matrix.change(lambda n, t: (f"model.{n}", t)),
)


def compare(case: Case, directory: Path) -> str:
    """The verdict; one that begins with a capital is a fault."""
    try:
        write(directory, case)
    except Exception:
        return "transformers cannot write it"
    try:
        expected: Any = reference(directory)
    except Exception as error:
        expected = error
    try:
        tokens, rows = ours(directory, case.changes.get("vocab_size", 99))
    except ModelError:
        return "both refuse" if isinstance(expected, Exception) else "only we refuse"
    except Exception as error:
        return f"RAISED {error!r}"
    if isinstance(expected, Exception):
        return f"ONLY TRANSFORMERS REFUSES {expected!r}"
    same = tokens == expected[0] and torch.allclose(rows, expected[1], atol=2e-4, rtol=2e-4)
    return "same" if same else "DIFFERENT"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    chance, verdicts = Random(asked.seed), Counter[str]()
    for _ in range(asked.count):
        names = chance.sample(list(FIELDS), chance.randint(1, 4))
        case = Case(
            chance.choice(list(BASES)),
            {name: chance.choice(FIELDS[name]) for name in names},
            files=chance.choice(FILES),
        )
        with tempfile.TemporaryDirectory() as directory:
            verdict = compare(case, Path(directory))
        verdicts[verdict.split(" ")[0] if verdict[0].isupper() else verdict] += 1
        if verdict[0].isupper():
            print(verdict, case)
    print(dict(verdicts))
    return any(verdict[0].isupper() for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
