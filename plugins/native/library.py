"""The compiled library: where it is, how it is built and found, and its functions.

Its file is named after a digest of its source and of the command that builds it, so one of another version is
never loaded: after an update runs stay in Python until `python -m plugins.native.build` was called again.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_uint8, c_void_p
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from plugins.models.checkpoints import cache_dir

SOURCE = Path(__file__).parent / "source"
#: No option may change what a floating-point operation answers: the twin's clock is Python's to the bit.
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-fast-math", "-ffp-contract=off")
COMPILERS = ("c++", "g++", "clang++")
FOLDER = "HEADWAY_NATIVE"  # environment: where the library is kept, instead of the cache directory


class Terms(Structure):
    _fields_ = [
        *((name, c_double) for name in ("floor", "sequence", "decode_context", "prompt_context", "pair")),
        *((name, c_void_p) for name in ("knots", "slopes", "sizes")),
        ("num_knots", c_int64),
        ("num_sizes", c_int64),
    ]


class Setup(Structure):
    _fields_ = [
        *((name, c_int64) for name in (
            "max_num_seqs", "most_preemptions", "max_num_batched_tokens", "max_inflight", "num_blocks",
            "block_size",
            "placeholders", "caches", "logs", "pause_steps", "pause_numbers", "chunked", "token_budget",
            "chunk_size", "whole_prompts", "watermark", "pp",
        )),
        ("step_overhead", c_double),
        ("charge", c_double),
        ("coefficients", c_double * 10),
        ("measured", c_int64),
        ("terms", Terms * 2),
    ]  # fmt: skip


class ArrivalRow(Structure):
    _fields_ = [
        *((name, c_int64) for name in (
            "index", "num_prompt_tokens", "max_num_tokens", "hidden_end", "low", "size", "base", "stride",
            "root_key",
            "salt", "refused", "num_stop_tokens",
        )),
        ("time", c_double),
    ]  # fmt: skip


class Counts(Structure):
    _fields_ = [
        *((name, c_int64) for name in (
            "num_steps", "planned_tokens", "kv_peak", "num_evictions", "num_preemptions", "num_running",
            "num_waiting",
        )),
        ("now", c_double),
        ("busy_time", c_double),
        ("digest", c_uint8 * 16),
    ]  # fmt: skip


class Column(Structure):
    _fields_ = [("values", c_void_p), ("length", c_int64)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "headway_new": (c_void_p, [POINTER(Setup)]),
    "headway_chain_key": (c_int64, [c_int64, c_void_p, c_int64]),
    "headway_free": (None, [c_void_p]),
    "headway_arrive": (c_int32, [c_void_p, POINTER(ArrivalRow), c_void_p, c_void_p]),
    "headway_arrivals_end": (None, [c_void_p]),
    "headway_run": (c_int32, [c_void_p]),
    "headway_abort": (c_int32, [c_void_p, c_int64]),
    "headway_abort_all": (None, [c_void_p]),
    "headway_ended": (c_int64, [c_void_p, POINTER(Column)]),
    "headway_log": (None, [c_void_p, POINTER(Column)]),
    "headway_clear_log": (None, [c_void_p]),
    "headway_readings": (None, [c_void_p, POINTER(Column)]),
    "headway_counts": (None, [c_void_p, POINTER(Counts)]),
}


def path() -> Path:
    """Of the library that belongs to this source, built or not."""
    folder = os.environ.get(FOLDER)
    return (Path(folder) if folder else cache_dir() / "native") / f"engine-{_digest()}.so"


@cache
def _digest() -> str:
    digest = blake2b(" ".join(OPTIONS).encode(), digest_size=8)
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def missing() -> str:
    """Why there is no library; "" where there is one."""
    if not path().is_file():
        return "the compiled engine is not built: python -m plugins.native.build"
    try:
        load()
    except OSError as error:  # damaged, or of another machine that shares the folder
        return f"the compiled engine cannot be loaded ({error}): delete it and build it again"
    return ""


def build() -> str:
    """Compiles it, unless that was done. Returns why it cannot be had; "" where it can."""
    target = path()
    if target.is_file():
        return ""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        return f"no C++ compiler is found ({', '.join(COMPILERS)} or $CXX)"
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*compiler.split(), *OPTIONS, str(SOURCE / "headway.cpp"), "-o", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return f"{compiler} failed: {said[0]}"
        _load(scratch)
        scratch.replace(target)  # at once, so that nobody loads half of it
    except OSError as error:
        return str(error)
    finally:
        scratch.unlink(missing_ok=True)
    return ""


def load() -> ctypes.CDLL:
    return _load(path())


@cache
def _load(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
