"""tokenizer.json with the added and special tokens of the files beside it: the same tokenizer as transformers
5 makes of them.

Sources, in the order in which the later one wins: tokenizer_config.json's named tokens (bos_token, ...), then
its added_tokens_decoder; only a checkpoint without that has special_tokens_map.json and added_tokens.json
read. Padding and truncation that a tokenizer.json was saved with belong to training: nothing here obeys them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Fast

from headway import ModelError

from .files import is_there, read_object, read_text

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS = "tokenizer_config.json"
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE_LEVEL = re.compile(r'"type"\s*:\s*"ByteLevel"')
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
LARGEST = 1 << 30  # bytes of a tokenizer.json
QWEN2_WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

#: Tokenizer classes that bring their own tokens where tokenizer_config.json names none.
DEFAULTS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": {
        "unk_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
}


@dataclass(frozen=True)
class SpecialTokens:
    """What the files beside tokenizer.json say about its tokens."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    named: Mapping[str, AddedToken] = field(default_factory=dict)  # bos_token, ..., image_token, ...
    extra: tuple[AddedToken, ...] = ()  # special ones without a name
    added: Mapping[int, AddedToken] = field(default_factory=dict)  # by id
    with_own: bool = True  # tokenizer.json's own added tokens count among `added`

    @classmethod
    def read(cls, directory: Path, settings: Mapping[str, Any], defaults: Mapping[str, str]) -> SpecialTokens:
        """Raises ModelError with the file and the field of what cannot be a token. defaults: names that
        `settings` may lack."""
        path = directory / SETTINGS
        fields = {**defaults, **settings}
        fields.setdefault("extra_special_tokens", fields.pop("additional_special_tokens", None))
        with_own = "added_tokens_decoder" not in fields
        other = directory / "special_tokens_map.json"
        if with_own and is_there(other):
            _merge(fields, read_object(other))
            named, extra = _special(f"{path} and {other.name}", fields)
        else:
            named, extra = _special(str(path), fields)
        if not with_own:
            added = _by_id(path, fields["added_tokens_decoder"])
        else:
            contents = {token.content for token in (*named.values(), *extra)}
            added = _added_before(directory / "added_tokens.json", contents)
        return cls(settings, named, extra, added, with_own)


def _merge(fields: dict[str, Any], found: dict[str, Any]) -> None:
    """special_tokens_map.json wins over tokenizer_config.json; its tokens without a name come after those of
    the other."""
    found = {name: _typed(value) for name, value in found.items()}
    extra, additional = found.pop("extra_special_tokens", None), found.pop("additional_special_tokens", None)
    before = fields["extra_special_tokens"]
    if isinstance(extra, list) and isinstance(before or [], list):
        before = before or []
        fields["extra_special_tokens"] = [*before, *(token for token in extra if token not in before)]
    elif extra is not None:
        fields["extra_special_tokens"] = extra
    elif before is None:
        fields["extra_special_tokens"] = additional
    fields |= found


def _typed(value: Any) -> Any:
    """In this file a token needs no "__type"."""
    if isinstance(value, list):
        return [_typed(each) for each in value]
    return value | {"__type": "AddedToken"} if isinstance(value, dict) and "content" in value else value


def _special(where: str, fields: dict[str, Any]) -> tuple[dict[str, AddedToken], tuple[AddedToken, ...]]:
    """Named tokens, in the order in which new ones get their ids, and special ones without a name."""
    extra = fields["extra_special_tokens"] or []
    named = {name: fields[name] for name in NAMED if fields.get(name) is not None}
    others = {name: value for name, value in fields.items() if name.endswith("_token") and name not in NAMED}
    named |= {name: value for name, value in others.items() if isinstance(value, dict) and "__type" in value}
    own = fields.get("model_specific_special_tokens") or {}
    if not isinstance(own, dict):
        raise ModelError(f"{where}: model_specific_special_tokens: expected an object of named tokens")
    named |= own
    named |= {name: value for name, value in others.items() if isinstance(value, str)}
    if isinstance(extra, dict):
        named |= extra
        extra = []
    if not isinstance(extra, list):
        raise ModelError(f"{where}: extra_special_tokens: expected a list, or an object of named tokens")
    tokens = {name: _token(where, name, value) for name, value in named.items()}
    return tokens, tuple(_token(where, "extra_special_tokens", value) for value in extra)


def _token(where: str, name: str, value: Any) -> AddedToken:
    """A text, or an AddedToken as files write it."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        content, flags = value.get("content"), {flag: bool(value[flag]) for flag in FLAGS if flag in value}
        if isinstance(content, str):
            return AddedToken(content, special=True, **flags)
    raise ModelError(f'{where}: {name}={value!r}: expected a text, or an object of "__type": "AddedToken"')


def _by_id(path: Path, found: Any) -> dict[int, AddedToken]:
    try:
        return {int(token): AddedToken(**value) for token, value in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: added_tokens_decoder: expected id -> token: {error}") from None


def _added_before(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json, which checkpoints of before 2023 have."""
    if not is_there(path):
        return {}
    found = read_object(path)
    if wrong := [token for token, index in found.items() if not isinstance(index, int)]:
        raise ModelError(f"{path}: {wrong[0]!r}: {found[wrong[0]]!r}: expected the token's id")
    return {index: _added(token, token in special) for token, index in found.items()}


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, normalized=not special, special=special)


def load_tokenizer(directory: Path) -> tuple[Fast, SpecialTokens]:
    """The tokenizer of tokenizer.json, and what the files beside it say. Raises ModelError for what is
    none."""
    path = directory / "tokenizer.json"
    if not is_there(path):
        raise ModelError(f"{path} is missing: texts need it; without one give token ids")
    source = read_text(path, LARGEST)
    settings = read_object(directory / SETTINGS) if is_there(directory / SETTINGS) else {}
    chosen = _class(directory, settings, byte_level=BYTE_LEVEL.search(source) is not None)
    special = SpecialTokens.read(directory, settings, DEFAULTS.get(chosen, {}))
    try:
        fast = Fast.from_str(source)
        _follow(fast, chosen, settings)
        fast.add_tokens(_new_tokens(fast, special))
        if chosen == "Qwen2Tokenizer":
            all_special = (*special.named.values(), *special.extra)
            fast.add_special_tokens([AddedToken(token.content, special=True) for token in all_special])
    except BaseException as error:  # the library's panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ModelError(f"{path} cannot be read: {error}") from None
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = bool(settings.get("split_special_tokens"))
    return fast, special


def _new_tokens(fast: Fast, special: SpecialTokens) -> list[AddedToken]:
    """Everything that is not yet an added token of the file, as it is said beside it: by id, then by name,
    then the others."""
    own = fast.get_added_tokens_decoder()
    added = {**special.added, **own} if special.with_own else special.added
    new = [added[index] for index in sorted(added)]
    names = {token.content for token in special.named.values()}
    for token in new:
        token.special = token.special or token.content in names
    known = {token.content for token in (*own.values(), *new)}
    for token in (*special.named.values(), *special.extra):
        if token.content not in known:
            known.add(token.content)
            new.append(token)
    return new


# ---- classes that do not take tokenizer.json at its word -------------------------------------------------


def _class(directory: Path, settings: Mapping[str, Any], byte_level: bool) -> str:
    """The class that transformers' AutoTokenizer chooses, where it is one that brings its own rules; "" for
    all others."""
    path = directory / "config.json"
    config = read_object(path) if is_there(path) else {}
    named = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    declared = str(named).removesuffix("Fast")
    model_type = config.get("model_type")
    if model_type == "qwen2" or declared == "Qwen2Tokenizer" or (model_type == "qwen3" and not declared):
        return "Qwen2Tokenizer"
    return "LlamaTokenizer" if declared == "LlamaTokenizer" and not byte_level else ""


def _follow(fast: Fast, chosen: str, settings: Mapping[str, Any]) -> None:
    """Such a class takes vocabulary, merges and post-processor from the file and nothing else."""
    model = fast.model
    if not chosen or not isinstance(model, models.BPE):
        return
    llama = chosen == "LlamaTokenizer"
    model.dropout, model.unk_token, model.ignore_merges = None, None, False
    model.fuse_unk = model.byte_fallback = llama
    blank = settings.get("add_prefix_space")
    if llama:
        blank = blank is None or bool(blank)
        scheme = "never" if not blank else "always" if settings.get("legacy", False) else "first"
        fast.normalizer = None
        fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme=scheme, split=False)
        strip = [decoders.Strip(content=" ", left=1)] if blank else []
        blanks = decoders.Replace(BLANK, " ")
        fast.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse(), *strip])
    else:
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated", invert=False)
        fast.normalizer = normalizers.NFC()
        letters = pre_tokenizers.ByteLevel(add_prefix_space=bool(blank), use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        fast.decoder = decoders.ByteLevel()
