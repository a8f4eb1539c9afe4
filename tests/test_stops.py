"""Tokens to text: an answer reads on from its prompt, and its stop strings are found in it wherever tokens
begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from helpers.scripted import engine
from helpers.tokenizers_made import byte_level, metaspace
from helpers.torch_engines import AutoModelForCausalLM  # noqa: F401 - sets transformers up, offline
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from headway import Arrival, Engine, EngineConfig, OracleExecutor, Request, SamplingParams, TextStop
from plugins.models.tokenizer import Tokenizer, stop_text

KINDS = {"byte_level": byte_level, "metaspace": metaspace}


@dataclass(frozen=True)
class Made:
    """Our tokenizer, transformers', and what a test needs to know of them."""

    ours: Tokenizer
    theirs: object
    special: int
    padding: int = 1000  # an id that the model has and the tokenizer has not


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    directory = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    special = {"byte_level": 257, "metaspace": 1}[request.param]
    return Made(Tokenizer(directory), AutoTokenizer.from_pretrained(directory), special)


def bytes_of(made: Made, text: str) -> list[int]:
    """Tokens of one byte each."""
    fast = made.ours._fast
    if (first := fast.token_to_id("<0x00>")) is not None:
        return [first + byte for byte in text.encode()]
    return [token for letter in text for token in _letters(made, letter)]


def _letters(made: Made, letter: str) -> list[int]:
    ((mapped, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        letter
    )
    return [made.ours._fast.token_to_id(byte) for byte in mapped]


def request_of(made: Made, prompt: list[int], answer: list[int], *stops: str) -> tuple[Request, int | None]:
    """The request once its stop has fired, and after how many tokens; None when none fired."""
    arrival = Arrival(0.0, prompt, SamplingParams(stop=stops, max_tokens=None))
    request = Request(arrival, 0, max_model_len=10_000, eos_token_ids=frozenset())
    stopped = stop_text(made.ours)
    for count, token in enumerate(answer, 1):
        request.token_ids.append(token)
        if (stop := stopped(request)) is not None:
            request.stop_text, request.stop_reason = stop
            return request, count
    return request, None


# ---- an answer's text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["the Paris is", "a", "[INST] the [/INST]", "ends with a blank ", "a line\n", "é€"]
)
@pytest.mark.parametrize("answer", ["the Paris", " the  Paris", "é € 東京", "", "\n", "END.", " "])
def test_an_answer_reads_on_from_its_prompt(made, prompt, answer):
    before = made.ours.encode(prompt)
    after = made.theirs(answer, add_special_tokens=False)["input_ids"]
    whole, head = (made.theirs.decode(ids, skip_special_tokens=True) for ids in (before + after, before))
    assert made.ours.continuation(before + after, len(before)) == whole[len(head) :]


def test_the_first_blank_is_kept_after_a_prompt_and_lost_after_none(tmp_path):
    tokenizer = Tokenizer(metaspace(tmp_path))
    paris = tokenizer.encode("Paris")[1:]
    prompt = tokenizer.encode("the")
    assert tokenizer.continuation(prompt + paris, len(prompt)) == " Paris"
    assert tokenizer.continuation([1, *paris], 1) == "Paris", "a special token is no text"
    assert tokenizer.continuation([*prompt, 1, 1, 1, 1, 1, 1, 1, *paris], len(prompt) + 7) == " Paris", (
        "text decides, however far it is"
    )


def test_characters_in_several_tokens(made):
    tokens = bytes_of(made, "a東京é")
    assert (
        made.ours.continuation([*made.ours.encode("the"), *tokens], len(made.ours.encode("the"))) == "a東京é"
    )


def test_a_character_that_began_in_the_prompt_is_the_prompts(made):
    prompt = [*made.ours.encode("the "), *bytes_of(made, "é")[:1]]
    answer = [*bytes_of(made, "é")[1:], *bytes_of(made, "xy")]
    assert made.ours.continuation(prompt + answer, len(prompt)) == "xy"


def test_pieces_are_what_tokens_add_to_a_text(made):
    for token in made.ours.encode("the Paris is a b")[1:]:
        inside = made.ours.decode([*made.ours.encode("the"), token])
        assert made.ours.decode(made.ours.encode("the")) + made.ours.piece(token) == inside
    assert made.ours.piece(made.special) in ("<|im_start|>", "<s>"), "special tokens are named"
    assert made.ours.piece(made.padding) == ""


# ---- stop strings ----------------------------------------------------------------------------------------


def test_a_stop_inside_a_token_and_over_several(made):
    prompt, answer = made.ours.encode("the"), made.ours.encode("the Paris is END")
    text = made.ours.continuation(prompt + answer, len(prompt))
    for stop in ("ari", "Paris is", "END", "s", " P", "is E"):
        request, count = request_of(made, prompt, answer, stop)
        assert (
            count is not None
            and request.stop_text == text[: text.index(stop)]
            and request.stop_reason == stop
        )
        assert stop in made.ours.continuation(prompt + answer[:count], len(prompt))
        assert stop not in made.ours.continuation(prompt + answer[: count - 1], len(prompt))


def test_a_stop_that_begins_with_the_first_blank(tmp_path):
    made = Made(Tokenizer(metaspace(tmp_path)), None, 1)
    paris = made.ours.encode("Paris")[1:]
    request, count = request_of(made, made.ours.encode("the"), paris, " Paris")
    assert (count, request.stop_text) == (len(paris), "")


@pytest.mark.parametrize("number", [1, 9, 40, 300])
def test_a_stop_behind_tokens_without_text(made, number):
    prompt, silent = made.ours.encode("the"), [made.special, made.padding] * number
    for stop, newest in (("END", "END"), ("EN", "END"), ("E", "E")):
        answer = [*bytes_of(made, stop[0]), *silent, *bytes_of(made, newest[1:]), *bytes_of(made, "more")]
        assert request_of(made, prompt, answer, stop)[0].stop_text == ""


def test_a_stop_of_whole_characters_in_bytes(made):
    answer = bytes_of(made, "ab東京cd")
    request, count = request_of(made, made.ours.encode("the"), answer, "京")
    assert (request.stop_text, count) == ("ab東", 8)


def test_of_several_stops_the_one_that_begins_first_cuts(made):
    prompt, answer = made.ours.encode("the"), made.ours.encode("Paris is the END")
    request, _ = request_of(made, prompt, answer, "END", "the", "zzz", "is is")
    text = made.ours.continuation(prompt + answer, len(prompt))
    assert request.stop_text == text[: text.index("is is")] and request.stop_reason == "is is"
    both, count = request_of(made, prompt, bytes_of(made, "xxab"), "ab", "b", "xab")
    assert (both.stop_text, both.stop_reason, count) == ("x", "xab", 4)


@pytest.mark.parametrize("stop", ["is", "the Paris", "sP", "e"])
def test_the_prompt_stops_nothing(made, stop):
    prompt = made.ours.encode("the Paris is s")
    assert request_of(made, prompt, bytes_of(made, "Pxx"), stop)[1] is None


def test_stops_fire_with_the_first_token_that_completes_one(made):
    """Random tokens and stops taken from what they say, against the definition."""
    random = Random(0)
    for _ in range(60):
        prompt = [random.randrange(330) for _ in range(random.randint(1, 12))]
        answer = [random.choice((random.randrange(330), made.special)) for _ in range(random.randint(1, 40))]
        text = made.ours.continuation(prompt + answer, len(prompt))
        starts = [random.randrange(len(text) + 1) for _ in range(3)]
        stops = [stop for at in starts if (stop := text[at : at + random.randint(1, 9)])] or ["never said"]
        texts = [
            made.ours.continuation(prompt + answer[:count], len(prompt))
            for count in range(1, len(answer) + 1)
        ]
        expected = next((n for n, said in enumerate(texts, 1) if any(stop in said for stop in stops)), None)
        request, count = request_of(made, prompt, answer, *stops)
        assert count == expected, (prompt, answer, stops)
        if count is not None:
            assert (
                request.stop_text
                == texts[count - 1][: min(at for s in stops if (at := texts[count - 1].find(s)) >= 0)]
            )


# ---- endings, in the engine ------------------------------------------------------------------------------


def run(sampling: SamplingParams, stop_after: int | None = None, **arrival):
    """One request on an executor whose tokens are known; a stop string is completed by its token number
    `stop_after`."""
    roles = engine().roles.given | {"executor": OracleExecutor()}
    stop = TextStop("", "x")
    running = Engine(
        roles, EngineConfig(4, 16), stop_text=lambda r: stop if r.num_output_tokens == stop_after else None
    )
    (output,) = running.run([Arrival(0.0, [1, 2], sampling, id="a", **arrival)]).outputs
    return output


@pytest.mark.parametrize("limit", [3, 4])
def test_a_stop_string_completed_by_the_last_token_is_a_stop(limit):
    output = run(SamplingParams(max_tokens=limit, stop="x"), stop_after=3)
    assert (output.finish_reason, len(output.output_token_ids)) == ("stop", 3)


def test_the_token_that_ended_an_answer_is_said():
    tokens = run(SamplingParams(max_tokens=6)).output_token_ids
    output = run(SamplingParams(max_tokens=6, stop_token_ids=(tokens[2],)))
    assert (output.finish_reason, output.stop_reason) == ("stop", tokens[2])
    assert output.output_token_ids == tokens[: tokens.index(tokens[2]) + 1]
    assert run(SamplingParams(max_tokens=6)).stop_reason is None
    assert run(SamplingParams(max_tokens=6), output_len=4).stop_reason is None, (
        "an emulated ending is no token's doing"
    )


def test_the_last_allowed_token_may_be_a_stop_token():
    tokens = run(SamplingParams(max_tokens=6)).output_token_ids
    last = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    assert run(SamplingParams(max_tokens=last + 1, stop_token_ids=(tokens[last],))).finish_reason == "stop"


@pytest.mark.parametrize("stop", ["", ("", "x"), ["x", ""]])
def test_an_empty_stop_string_is_refused(stop):
    with pytest.raises(ValueError, match="stop="):
        SamplingParams(stop=stop)


def test_a_stop_string_that_is_in_no_text_stops_nothing(made):
    assert request_of(made, made.ours.encode("the"), bytes_of(made, "abc"), "\ud800")[1] is None


def test_no_stop_strings():
    assert SamplingParams(stop=None).stop == SamplingParams(stop=[]).stop == ()
