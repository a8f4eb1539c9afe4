"""Tokenizers of the kinds that checkpoints have, made in a moment: byte-level as Qwen's, and with
sentencepiece's blanks as Llama 2's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Fast

from plugins.models.tiny import LLAMA, QWEN3, write_tokenizer

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
MERGES = (
    "▁ t",
    "h e",
    "▁t he",
    "▁ P",
    "a r",
    "i s",
    "▁P ar",
    "▁Par is",
    "▁ i",
    "▁i s",
    "▁ E",
    "N D",
    "▁E ND",
    "▁ [",
)


def byte_level(directory: Path, **settings: Any) -> Path:
    """Settings of tokenizer_config.json that are given as None are left out."""
    write(directory, "config.json", QWEN3)
    write_tokenizer(directory)
    return edit(directory, **settings)


def metaspace(directory: Path, **settings: Any) -> Path:
    """Blanks are letters of the tokens, the first of a text is taken off; bytes where there is no letter."""
    write(directory, "config.json", LLAMA)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    letters = f"{BLANK}abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,[]/<>|!'"
    merges = [tuple(merge.split()) for merge in MERGES]
    for piece in (*letters, *("".join(merge) for merge in merges)):
        vocab.setdefault(piece, len(vocab))
    fast = Fast(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    fast.save(str(directory / "tokenizer.json"))
    return edit(directory, **settings)


def edit(directory: Path, **settings: Any) -> Path:
    path = directory / "tokenizer_config.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return write(
        directory, path.name, {name: value for name, value in (found | settings).items() if value is not None}
    )


def write(directory: Path, name: str, content: Any) -> Path:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def added(content: str, **flags: bool) -> dict[str, Any]:
    """A token as added_tokens_decoder writes it."""
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    } | flags
