"""What the bodies of messages hold: a few dataclasses as JSON; steps and results as little-endian buffers.

No body names code. A message is refused as `Malformed` unless it has exactly the fields of its dataclass, of
their types; a kernels config is sent as the name under which its plugin is registered, and its parameters.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import types
from dataclasses import dataclass, fields
from math import prod
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from headway import ConfigError, EngineConfig, ModelConfig

from ..executors.torch.batch import StepInput
from ..executors.torch.config import TorchConfig
from .channel import Malformed
from .config import MeshConfig

T = TypeVar("T")
Plain = None | bool | int | float | str | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Hello:
    """A rank that torchrun started, on one of its two connections."""

    rank: int
    host: str
    purpose: str  # "orders" or "store"
    facts: dict[str, str]  # of the run as this rank composed it


@dataclass(frozen=True)
class Registered:
    """A kernels config, without its code: the rank builds it again from its own registry."""

    name: str
    made_by: str  # module and class; two plugins of one name must not be taken for each other
    parameters: dict[str, Plain]


@dataclass(frozen=True)
class Order:
    """The Job of execution.py in plain values."""

    executor: TorchConfig
    model: ModelConfig
    kernels: Registered | None
    engine: EngineConfig
    seed: int
    parallel: MeshConfig
    store_file: str = ""  # where ranks meet instead of over their second connection: see launch.py


@dataclass(frozen=True)
class Call:
    """A method of RankExecution; worker.py lists those that can be called."""

    method: str
    args: list[int | str]


@dataclass(frozen=True)
class Answer:
    value: None | int | list[float]


@dataclass(frozen=True)
class Raised:
    reason: str
    secondary: bool  # it failed because another rank did


@dataclass(frozen=True)
class Refused:
    reason: str


# ---- dataclasses -----------------------------------------------------------------------------------------


def pack(message: Any) -> bytes:
    try:
        return json.dumps(dataclasses.asdict(message), default=_unknown).encode()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"a {type(message).__name__} cannot be sent to another rank: {error}") from error


def _unknown(value: Any) -> Any:
    expected = "expected text, numbers, true, false, null, and lists of them"
    raise ConfigError(f"{value!r} cannot be sent to another rank: {expected}")


def unpack(kind: type[T], body: bytes) -> T:
    """Raises Malformed for anything but what `pack` makes of a `kind`."""
    try:
        made: T = _built(kind, json.loads(body.decode()), kind.__name__)
        return made
    except (ValueError, TypeError, RecursionError, ConfigError) as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed(f"no {kind.__name__}: {error}") from error


def _built(expected: Any, value: Any, where: str) -> Any:
    """value as `expected` says. A whole number is a float too, as in Python."""
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        hints = get_type_hints(expected)
        if not isinstance(value, dict) or set(value) != set(hints):
            raise Malformed(f"{where} is {_short(value)}: expected {', '.join(hints)}")
        parts = {name: _built(hints[name], part, f"{where}.{name}") for name, part in value.items()}
        return expected(**parts)
    origin, inner = get_origin(expected), get_args(expected)
    if expected is Any:
        return value
    if origin in (Union, types.UnionType):
        return _alternative(inner, value, where)
    if origin is list and isinstance(value, list):
        return [_built(inner[0], part, where) for part in value]
    if origin is dict and isinstance(value, dict):
        return {name: _built(inner[1], part, f"{where}.{name}") for name, part in value.items()}
    if expected is float and type(value) is int:
        return float(value)
    if isinstance(expected, type) and type(value) is expected:
        return value
    raise Malformed(f"{where} is {_short(value)}: expected {getattr(expected, '__name__', expected)}")


def _alternative(alternatives: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(value) in alternatives:
        return value
    for alternative in alternatives:
        try:
            return _built(alternative, value, where)
        except Malformed as error:
            reason = error
    raise reason


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def readable(text: str) -> str:
    """Text of another process, without what a terminal or a file may refuse."""
    return text.encode("utf-8", "replace").decode()


# ---- what is sent again and again ------------------------------------------------------------------------

#: Integers and booleans, in the order of the class.
_NUMBERS = [f.name for f in fields(StepInput) if f.name not in ("data", "sampled")]
_STEP = struct.Struct(f"<{len(_NUMBERS)}i")
_BEAT = struct.Struct("<QQ")
_RESULT = struct.Struct("<Ii")  # chunks that sample; alternatives of each, -1: no log-probabilities
_INT32, _INT64, _FLOAT32 = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<f4")


def pack_step(step: StepInput) -> bytes:
    """48 bytes and the buffer. Which plan indices sample stays with the driver, who alone tells requests
    apart."""
    numbers = _STEP.pack(*[getattr(step, name) for name in _NUMBERS])
    return numbers + step.data.astype(_INT32, copy=False).tobytes()


def unpack_step(body: bytes) -> StepInput:
    if len(body) < _STEP.size or (len(body) - _STEP.size) % _INT32.itemsize:
        raise Malformed(f"no step: {len(body)} bytes, expected {_STEP.size} and a multiple of 4")
    numbers = dict(zip(_NUMBERS, _STEP.unpack_from(body), strict=True))
    return StepInput(data=np.frombuffer(body, dtype=_INT32, offset=_STEP.size), sampled=None, **numbers)


def pack_result(tokens: np.ndarray, logprobs: tuple[np.ndarray, ...] | None) -> bytes:
    """tokens int64 [S]; logprobs as in Sampled: float32 [S], int64 [S], float32 [S, n], int64 [S, n]."""
    parts: list[tuple[np.ndarray, Any]] = [(tokens, _INT64)]
    if logprobs is not None:
        parts += zip(logprobs, (_FLOAT32, _INT64, _FLOAT32, _INT64), strict=True)
    alternatives = -1 if logprobs is None else logprobs[2].shape[1]
    arrays = [part.astype(kind, copy=False).tobytes() for part, kind in parts]
    return b"".join([_RESULT.pack(len(tokens), alternatives), *arrays])


def unpack_result(body: bytes) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
    if len(body) < _RESULT.size:
        raise Malformed(f"no result: {len(body)} bytes")
    count, n = _RESULT.unpack_from(body)
    one, many = (count,), (count, n)
    shapes: list[tuple[tuple[int, ...], np.dtype]] = [(one, _INT64)]
    if n >= 0:
        shapes += [(one, _FLOAT32), (one, _INT64), (many, _FLOAT32), (many, _INT64)]
    sizes = [kind.itemsize * prod(shape) for shape, kind in shapes]
    if n < -1 or len(body) != _RESULT.size + sum(sizes):
        raise Malformed(f"no result: {len(body)} bytes for {count} tokens and {n} alternatives")
    arrays, at = [], _RESULT.size
    for (shape, kind), size in zip(shapes, sizes, strict=True):
        arrays.append(np.frombuffer(body[at : at + size], dtype=kind).reshape(shape).copy())
        at += size
    return arrays[0], tuple(arrays[1:]) if n >= 0 else None


def pack_beat(steps: int, collectives: int) -> bytes:
    return _BEAT.pack(steps, collectives)


def unpack_beat(body: bytes) -> tuple[int, int]:
    if len(body) != _BEAT.size:
        raise Malformed(f"no beat: {len(body)} bytes, expected {_BEAT.size}")
    return _BEAT.unpack(body)


# ---- the store's requests and answers --------------------------------------------------------------------

_LENGTH = struct.Struct("<I")


def pack_parts(parts: list[bytes]) -> bytes:
    return b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))


def unpack_parts(body: bytes) -> list[bytes]:
    parts, at = [], 0
    while at < len(body):
        left = len(body) - at - _LENGTH.size
        if left < 0 or left < (size := _LENGTH.unpack_from(body, at)[0]):
            raise Malformed(f"no parts: {len(body)} bytes, cut at {at}")
        at += _LENGTH.size + size
        parts.append(body[at - size : at])
    return parts
