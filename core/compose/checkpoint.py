"""A checkpoint directory: which of its files count, and what they say of the model. Reads no weights.

The files are those that transformers 5 reads: config.json, generation_config.json, and model.safetensors or
else the shards that model.safetensors.index.json lists. Other *.safetensors (adapters, other precisions,
optimizers) and pickles are never opened. Whatever is wrong with a file is a ModelError with its name, before
memory is taken.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelError
from .hf_config import HFConfig, read_eos, read_hf

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_LIMIT = 64 << 20  # bytes; an index of a thousand shards has a few MiB
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in a file -> torch's
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # named when there are no weights that count
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `name` is the file's own, which may lack the prefix that the model's name has."""

    path: Path
    name: str
    dtype: str  # as safetensors writes it: F32, BF16, I8 ...
    shape: tuple[int, ...]


def read(directory: Path) -> HFConfig:
    """What config.json says; the ends of an answer are generation_config.json's alone, where there is one."""
    path, generation = directory / "config.json", directory / "generation_config.json"
    with _naming(path):
        found = read_hf(read_json(path))
    if os.path.lexists(generation):
        with _naming(generation):
            return replace(found, eos_token_ids=read_eos(read_json(generation), found.shape["vocab_size"]))
    return found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a file's contents get its name."""
    try:
        yield
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from None
    except RecursionError:
        raise ModelError(f"{path} cannot be read: it is nested too deeply for a config") from None


def as_stored(config: HFConfig, directory: Path) -> HFConfig:
    """`config` with what the weights decide: a dtype where it names none, a head where it says tied."""
    tensors = find_tensors(directory)
    shape = dict(config.shape)
    if shape["dtype"] is None:
        in_order = sorted(tensors.values(), key=lambda tensor: (tensor.path, tensor.name))
        shape["dtype"] = next((FLOATS[tensor.dtype] for tensor in in_order if tensor.dtype in FLOATS), None)
    if shape["tie_word_embeddings"] and EMBEDDING in tensors and HEAD in tensors:
        shape["tie_word_embeddings"] = _equal(tensors[EMBEDDING], tensors[HEAD])
    return replace(config, shape=shape)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        check_regular(path)
        if (size := path.stat().st_size) > JSON_LIMIT:
            raise ModelError(f"{path} has {size} bytes: expected a JSON file of at most {JSON_LIMIT}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror or error}): expected a Hugging Face checkpoint"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path} cannot be read: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} cannot be read: expected a JSON object, found {type(found).__name__}")
    return found


def check_regular(path: Path) -> None:
    """Refuses what would block or has no bytes: fifos, devices, directories. OSError: nothing is there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            text = f"{path} is a link to {os.readlink(path)}, which is not there"
            raise ModelError(f"{text}: download the checkpoint again") from None
        raise
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path} is {_kind(mode)}: expected a file")


def has_weights(directory: Path) -> bool:
    """Whether there are weights that `find_tensors` would open."""
    return (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The model's name of a tensor -> where it is, of all tensors in the files that count."""
    index = directory / INDEX
    listed: Mapping[str, str] = {}
    if (directory / WEIGHTS).is_file():
        paths = [directory / WEIGHTS]
    elif index.is_file():
        listed = _listed(index)
        paths = [directory / name for name in sorted(set(listed.values()))]
    else:
        raise ModelError(_no_weights(directory))
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in read_header(path):
            name = _model_name(tensor.name)
            if (other := found.setdefault(name, tensor)) is not tensor:
                places = " and ".join(f"{held.name!r} in {held.path}" for held in (other, tensor))
                raise ModelError(f"tensor {name!r} is there twice: {places}. Delete one")
    stored = {tensor.name for tensor in found.values()}
    if lost := sorted(name for name in listed if name not in stored):
        text = f"tensor {lost[0]!r} is listed in {index} for {listed[lost[0]]}"
        raise ModelError(f"{text}, which does not hold it ({len(lost)} such tensors)")
    return found


def read_header(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file. The library checks that they cover it: a cut file is found here."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        path.open("rb").close()  # the library says of every file that it cannot open that there is none
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                part = file.get_slice(name)
                yield StoredTensor(path, name, part.get_dtype(), tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        text = f"{path} cannot be read ({error})"
        raise ModelError(f"{text}: expected a whole safetensors file; download or copy it again") from None


def _listed(index: Path) -> dict[str, str]:
    """An index's map of tensor to file, whose files are all inside its directory."""
    with _naming(index):
        found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ModelError(f"{index} is broken: expected a weight_map of tensor names to file names")
    for name in sorted(set(found.values())):
        beside = os.path.basename(name) == name and "\\" not in name and "\0" not in name
        if not beside or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}: expected the name of a *.safetensors file beside it")
    return found


def _no_weights(directory: Path) -> str:
    seen = [path for path in (directory / WEIGHTS, directory / INDEX) if os.path.lexists(path)]
    text = f"no {WEIGHTS} or {INDEX} in {directory}"
    if seen:
        kind = _kind(seen[0].stat().st_mode) if seen[0].exists() else "a link to nothing"
        text += f" ({seen[0].name} is {kind})"
    try:
        others = sorted(path.name for path in directory.iterdir() if path.suffix in OTHER_WEIGHTS)
    except OSError:
        others = []
    if others:
        text += f", only {', '.join(others[:3])}"
    if any(not name.endswith(".safetensors") for name in others):
        text += " (pickles and GGUF are not read: convert them to safetensors)"
    return f"{text}: expected a checkpoint, or model.load_format=dummy for random weights"


def _model_name(name: str) -> str:
    """One saved from the bare decoder lacks `model.`; one from within another module has it twice."""
    if re.match(r"(embed_tokens|layers|norm)\.", name):
        return f"model.{name}"
    return re.sub(r"^model\.(?=model\.|lm_head\.)", "", name)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """The same bytes. Reads both tensors once, a piece at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pieces = zip(_pieces(one), _pieces(other), strict=True)
    return all(a == b for a, b in pieces)


def _pieces(tensor: StoredTensor, size: int = 1 << 22) -> Iterator[bytes]:
    with open(tensor.path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        first, last = json.loads(file.read(length))[tensor.name]["data_offsets"]
        file.seek(8 + length + first)
        for at in range(first, last, size):
            yield file.read(min(size, last - at))


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a fifo",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
