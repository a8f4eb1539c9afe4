"""What driver and ranks send each other: nothing that names code, and nothing but what was meant to be sent
is taken for a message."""

from __future__ import annotations

import ast
import json
import socket
import struct
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.faulty_kernels import FaultyKernels
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headway import ConfigError, EngineConfig, ModelConfig, load_registry
from plugins.executors.torch.batch import StepInput
from plugins.executors.torch.config import TorchConfig
from plugins.kernels.torch import TorchKernels
from plugins.parallel import channel as wire
from plugins.parallel import messages
from plugins.parallel.channel import LARGEST, Channel, Malformed
from plugins.parallel.config import MeshConfig
from plugins.parallel.execution import Job
from plugins.parallel.launch import order_of
from plugins.parallel.messages import Answer, Call, Hello, Order, Raised, Refused
from plugins.parallel.worker import job_of

SOURCES = sorted((Path(__file__).parent.parent / "plugins" / "parallel").glob("*.py"))
JOB = Job(
    TorchConfig(device="cpu"),
    ModelConfig(),
    TorchKernels(),
    EngineConfig(num_blocks=7),
    3,
    MeshConfig(pp=2, layers=[1, 3]),
)
STEP = StepInput(np.arange(300, dtype=np.int32), True, False, 256, 256, 256, 16, 0, 1, 1025, 0, -1, None)
EXAMPLES = [
    Hello(1, "host", "orders", {"seed": "0"}),
    order_of(JOB),
    order_of(replace(JOB, kernels=None)),
    Call("switch", ["whole", "library"]),
    Call("start", [1, 2, 3]),
    Answer(None),
    Answer(12),
    Answer([0.5, 1.0]),
    Raised("raised it", True),
    Refused("another seed"),
]
#: What reads each kind of body. All of them must refuse what is malformed in the same way.
READERS = {type(m).__name__: partial(messages.unpack, type(m)) for m in EXAMPLES} | {
    "step": messages.unpack_step,
    "result": messages.unpack_result,
    "beat": messages.unpack_beat,
    "parts": messages.unpack_parts,
}


# ---- no code ---------------------------------------------------------------------------------------------

RUNS_CODE = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "multiprocessing",
    "runpy",
    "code",
}
# where a received name could choose what is called
RECEIVING = ("channel.py", "start.py", "store.py", "worker.py")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nothing_here_turns_bytes_into_code(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & RUNS_CODE
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in RUNS_CODE
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "compile", "__import__", "torch.load", "np.load"), name
            # dist.broadcast_object_list and its like pickle
            assert "_object" not in name and "import_module" not in name, name
            assert name != "getattr" or source.name not in RECEIVING, ast.unparse(node)


# ---- what is sent arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_travels_unchanged(message):
    assert messages.unpack(type(message), messages.pack(message)) == message


def test_a_job_travels_unchanged():
    assert job_of(messages.unpack(Order, messages.pack(order_of(JOB))), load_registry()) == JOB


def test_a_step_travels_unchanged_in_48_bytes_and_its_buffer():
    body = messages.pack_step(STEP)
    back = messages.unpack_step(body)
    assert len(body) == 48 + STEP.data.nbytes
    assert np.array_equal(back.data, STEP.data)
    assert all(getattr(back, name) == getattr(STEP, name) for name in StepInput.__slots__ if name != "data")


@pytest.mark.parametrize("alternatives", [None, 0, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_results_travel_unchanged(count, alternatives):
    tokens = np.arange(count, dtype=np.int64) + 2**40
    logprobs = None
    if alternatives is not None:
        one, many = np.full(count, -0.5, np.float32), np.full((count, alternatives), -np.inf, np.float32)
        logprobs = (one, np.arange(count), many, np.ones((count, alternatives), np.int64))
    back, parts = messages.unpack_result(messages.pack_result(tokens, logprobs))
    assert np.array_equal(back, tokens) and back.flags.writeable
    assert (parts is None) == (logprobs is None)
    for ours, theirs in zip(parts or (), logprobs or (), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


# ---- what is not a message -------------------------------------------------------------------------------


def reads(name: str, body: bytes) -> bool:
    """Whether it is a message. Anything but a message or Malformed is raised."""
    try:
        READERS[name](body)
    except Malformed as error:
        assert str(error)
        return False
    return True


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["rank", "method", "args", "value"]) | st.text(max_size=8), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(READERS)),
    body=st.binary(max_size=200) | PLAIN.map(lambda value: json.dumps(value).encode()),
)
def test_any_bytes_are_a_message_or_refused(name, body):
    reads(name, body)


@settings(max_examples=200, deadline=None)
@given(message=st.sampled_from(EXAMPLES), data=st.data())
def test_a_message_with_another_value_anywhere_is_a_message_or_refused(message, data):
    plain = asdict(message)
    at = plain
    while (
        isinstance(at[key := data.draw(st.sampled_from(sorted(at)))], dict)
        and at[key]
        and data.draw(st.booleans())
    ):
        at = at[key]
    at[key] = data.draw(PLAIN)
    reads(type(message).__name__, json.dumps(plain).encode())


@settings(max_examples=100, deadline=None)
@example(at=0, cut=44, byte=0)  # less than its numbers
@example(at=0, cut=48, byte=0)  # they alone
@given(at=st.integers(0, 1243), cut=st.integers(0, 1244), byte=st.integers(0, 255))
def test_a_damaged_step_or_result_is_refused_or_has_its_shape(at, cut, byte):
    step = bytearray(messages.pack_step(STEP))
    step[at] = byte
    assert reads("step", bytes(step[:cut])) == (cut >= 48 and cut % 4 == 0)
    result = bytearray(messages.pack_result(np.arange(20), None))
    result[at % 8] = byte
    reads("result", bytes(result[:cut]))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("Hello", b""),
        ("Hello", b"{}"),
        ("Hello", b"\xff\xfe"),
        ("Hello", b"[" * 100_000),
        ("Hello", b"9" * 10_000),
        ("Call", b'{"method": "start"}'),
        ("Call", b'{"method": "start", "args": [{}]}'),
        ("Call", b'{"method": "start", "args": [], "more": 1}'),
        ("Answer", b'{"value": "text"}'),
        ("Answer", b'{"value": true}'),
        ("Raised", b'{"reason": 1, "secondary": true}'),
        ("step", b"x" * 47),
        ("step", b"x" * 49),
        ("beat", b"x" * 15),
        ("result", struct.pack("<Ii", 2**32 - 1, 2**31 - 1)),
        ("result", struct.pack("<Ii", 0, -2)),
        ("parts", b"\xff" * 4),
    ],
)
def test_what_is_no_message_is_refused(name, body):
    assert not reads(name, body)


def test_values_out_of_range_are_refused_as_a_config_is():
    plain = asdict(order_of(JOB))
    plain["parallel"]["tp"] = 0
    with pytest.raises(Malformed, match="parallel.tp=0"):
        messages.unpack(Order, json.dumps(plain).encode())


def test_text_of_another_process_can_be_printed():
    back = messages.unpack(Raised, messages.pack(Raised("half a surrogate: \ud83d", False)))
    assert messages.readable(back.reason).encode()


# ---- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (struct.pack("<cI", wire.BEAT, 17), "17 bytes: expected at most 16"),
        (struct.pack("<cI", wire.HELLO, 2**32 - 1), "4,294,967,295 bytes: expected at most 65,536"),
        (struct.pack("<cI", b"?", 0), "kind b'\\?': expected one of"),
    ],
)
def test_a_size_is_looked_at_before_memory_is_taken(head, message):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(head)  # and nothing more: whoever waited for a body would wait for ever
        with pytest.raises(Malformed, match=message):
            Channel(ours).receive()


def test_every_kind_has_a_largest_size():
    kinds = [value for name, value in vars(wire).items() if name.isupper() and isinstance(value, bytes)]
    assert sorted(kinds) == sorted(LARGEST)


# ---- kernels are known by their name ---------------------------------------------------------------------


def test_kernels_that_are_not_the_registered_ones_are_refused():
    stranger = FaultyKernels()
    stranger.plugin_name = "torch"
    with pytest.raises(
        ConfigError, match="kernels=torch is helpers.faulty_kernels.FaultyKernels where the run was composed"
    ):
        job_of(order_of(replace(JOB, kernels=stranger)), load_registry())
    with pytest.raises(ConfigError, match="kernels=faulty: there is no such kernels"):
        job_of(order_of(replace(JOB, kernels=FaultyKernels())), load_registry())


def test_kernels_with_parameters_that_are_no_plain_values_are_refused():
    kernels = TorchKernels()
    kernels.attention = object()  # type: ignore[assignment]
    with pytest.raises(
        ConfigError, match="<object object at .*> cannot be sent to another rank: expected text, numbers"
    ):
        messages.pack(order_of(replace(JOB, kernels=kernels)))
