"""One request that makes no sense is refused with a reason; the others are answered as if it had not come."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.scripted import ask, engine

from headway import Arrival, SamplingParams

BAD = {
    "no prompt": ({"prompt_token_ids": None}, "prompt is None"),
    "a text": ({"prompt_token_ids": "abc"}, "prompt is 'abc'"),
    "bytes": ({"prompt_token_ids": b"12345678"}, "prompt is b'12345678'"),
    "a set": ({"prompt_token_ids": {1, 2}}, "expected a list of token ids"),
    "a dict": ({"prompt_token_ids": {1: 2}}, "expected a list of token ids"),
    "floats": ({"prompt_token_ids": [1.0]}, "prompt holds 1.0"),
    "texts within": ({"prompt_token_ids": [1, "2"]}, "prompt holds '2'"),
    "lists within": ({"prompt_token_ids": [[1]]}, "prompt holds [1]"),
    "bools": ({"prompt_token_ids": [1, True]}, "prompt holds True"),
    "an array of floats": ({"prompt_token_ids": np.array([1.5])}, "prompt holds 1.5"),
    "an array of rows": ({"prompt_token_ids": np.array([[1, 2]])}, "prompt holds [1, 2]"),
    "an id beyond 64 bits": ({"prompt_token_ids": [10**30]}, "outside the vocabulary"),
    "a range beyond all memory": ({"prompt_token_ids": range(10**13)}, "does not fit"),
    "a range beyond all counting": ({"prompt_token_ids": range(10**30)}, "prompt is range(0"),
    "what may never end": ({"prompt_token_ids": iter([1])}, "expected a list of token ids"),
    "negative ids": ({"prompt_token_ids": [1, -1]}, "token id -1"),
    "no sampling": ({"sampling": None}, "sampling=None: expected SamplingParams"),
    "a dict of sampling": ({"sampling": {"temperature": 0}}, "expected SamplingParams"),
    "an id that is no text": ({"id": 5}, "id=5: expected a text or None"),
    "an id that cannot be kept": ({"id": ["a"]}, "id=['a']"),
    "a length that is none": ({"output_len": 2.5}, "output_len=2.5: expected an integer or None"),
    "tags that are none": ({"tags": "client"}, "tags='client': expected Tags"),
    "no latency targets": ({"slo": None}, "slo=None: expected an SLO"),
    "a salt that is none": ({"cache_salt": 5}, "cache_salt=5: expected a text"),
    "a text that is none": ({"prompt": b"abc"}, "prompt=b'abc'"),
    "more alternatives than tokens": (
        {"sampling": SamplingParams(logprobs=10**6)},
        "logprobs=1000000: the vocabulary has",
    ),
}


@pytest.mark.parametrize(("fields", "reason"), BAD.values(), ids=BAD)
def test_a_bad_arrival_is_refused_with_its_reason(fields, reason):
    bad = Arrival(**{"time": 0.0, "prompt_token_ids": [1, 2]} | fields)
    result = engine().run([ask(4, 2), bad, ask(4, 2)])
    assert [o.state for o in result.outputs] == ["finished", "rejected", "finished"]
    assert reason in result.outputs[1].finish_reason
    assert len({o.id for o in result.outputs}) == 3


def test_a_request_that_its_source_refuses_is_counted_and_refused_with_its_reason():
    result = engine().run([Arrival(0.0, [], refusal="half of a character", prompt="text"), ask(4, 2)])
    assert [(o.state, o.finish_reason) for o in result.outputs] == [
        ("rejected", "half of a character"),
        ("finished", "length"),
    ]


def test_a_refused_arrival_keeps_what_could_be_read():
    bad = Arrival(3.0, [1.5], id="mine", prompt="text")
    (output,) = engine().run([bad]).outputs
    assert (output.id, output.arrival_time, output.prompt) == ("mine", 3.0, "text")


@pytest.mark.parametrize(
    "prompt",
    [(1, 2, 3), range(1, 4), np.array([1, 2, 3]), list(np.array([1, 2, 3], dtype=np.int32))],
    ids=repr,
)
def test_integers_of_any_kind_are_token_ids(prompt):
    expected = engine().run([Arrival(0.0, [1, 2, 3], id="a")]).outputs[0].output_token_ids
    (output,) = engine().run([Arrival(0.0, prompt, id="a")]).outputs
    assert output.state == "finished" and output.output_token_ids == expected
