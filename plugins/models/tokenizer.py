"""Text to tokens and back, from a checkpoint's files; no transformers, so that it loads in milliseconds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from headway import ModelError, Request, RequestOutput, TextStop

from .chat_template import ChatTemplates
from .special_tokens import load_tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no whole character
HALF = re.compile("[\ud800-\udfff]")  # surrogates: no text, and no tokenizer takes them
LEAST, MOST = 4, 24  # tokens of context that decide how the next one reads, as in vLLM
LOOK_BACK = 256  # tokens among which they are looked for
PIECE = 1 << 16  # characters that are encoded at a time where a text may be too long
SHORT = 1 << 18  # characters that cost nothing worth a look


class Tokenizer:
    """`encode` adds the special tokens that the tokenizer itself adds; `decode` leaves special tokens out.

    max_tokens: the model's context; of a text that has far more tokens only the beginning is encoded, to say
    so.
    """

    def __init__(self, directory: Path, max_tokens: int | None = None) -> None:
        self.directory, self.max_tokens = directory, max_tokens
        self._fast, self._special = load_tokenizer(directory)
        added = self._fast.get_added_tokens_decoder()
        self._silent = {token for token in added if added[token].special}
        self._pieces: dict[int, str] = {}
        self._has_text: dict[int, bool] = {}

    # ---- to tokens ----------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Raises ModelError for what is no text, and for a text of more than twice `max_tokens` before its
        tokens are made."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        """messages: {"role", "content"} each; the prompt that asks for the assistant's answer. options: as
        ChatTemplates.render."""
        return self._encode(self._template.render(messages, **options), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text = str.__str__(text)  # a subclass is no text to the library
        if self.max_tokens is not None and len(text) > max(SHORT, self.max_tokens):
            self._refuse_too_long(text, self.max_tokens)
        return self._tokens(text, add_special_tokens)

    def _refuse_too_long(self, text: str, most: int) -> None:
        """In pieces, whose ends cost a few tokens more than the whole has: hence twice as many are needed to
        be sure."""
        count = 0
        for at in range(0, len(text), PIECE):
            count += len(self._tokens(text[at : at + PIECE], add_special_tokens=False))
            if count > 2 * most:
                what = f"prompt of {len(text):,} characters does not fit the context of {most:,}"
                raise ModelError(f"{what}: its beginning alone has {count:,} tokens")

    def _tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            if half := HALF.search(text):
                what = f"text holds {half[0]!r} at {half.start()}, half of a surrogate pair"
                raise ModelError(f"{what}: expected whole characters") from None
            raise

    @property
    def has_chat_template(self) -> bool:
        return bool(self._template.named)

    @cached_property
    def _template(self) -> ChatTemplates:
        return ChatTemplates(self.directory, self._special.settings, self._named_tokens)

    @property
    def _named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token ... as templates use them."""
        return {name: token.content for name, token in self._special.named.items()}

    # ---- to text ------------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens as if nothing came before them; answers want `continuation`."""
        return self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def continuation(self, token_ids: Sequence[int], start: int) -> str:
        """The text of `token_ids[start:]` as it continues the tokens before: what the whole text has more
        than theirs.

        A token's text depends on its neighbours: a sentence's first token has lost its blank, a character is
        several tokens. The last few tokens before `start` that have a text decide. A character that began
        before `start` belongs to what was before.
        """
        context, before = self._context(token_ids, start)
        if not context:
            return self.decode(token_ids[start:])
        whole = self.decode([*context, *token_ids[start:]])
        if whole.startswith(before):
            return whole[len(before) :]
        whole_characters = before.rstrip(BROKEN)
        if whole_characters != before and whole.startswith(whole_characters):
            return whole[len(whole_characters) + 1 :]
        return whole[len(os.path.commonprefix((before, whole))) :]

    def _context(self, token_ids: Sequence[int], start: int) -> tuple[list[int], str]:
        """Tokens with a text before `start`, and it: as few as begin with a whole character, the last few at
        least."""
        context: list[int] = []
        text = ""
        for at in range(start - 1, max(0, start - LOOK_BACK) - 1, -1):
            if not self.has_text(token_ids[at]):
                continue
            context.insert(0, token_ids[at])
            if len(context) >= LEAST:
                text = self.decode(context)
                if BROKEN not in text or len(context) == MOST:
                    return context, text
        return context, self.decode(context)

    def has_text(self, token: int) -> bool:
        """False for special tokens and for ids that the vocabulary has and the tokenizer has not."""
        if token not in self._has_text:
            self._has_text[token] = token not in self._silent and self._fast.id_to_token(token) is not None
        return self._has_text[token]

    def piece(self, token: int) -> str:
        """What a token adds to a text; a special one is named."""
        if token not in self._pieces:
            anchor = self._anchor
            alone = self.decode([*anchor, token], skip_special_tokens=False)
            self._pieces[token] = alone[len(self.decode(anchor)) :]
        return self._pieces[token]

    @cached_property
    def _anchor(self) -> list[int]:
        """A letter that others can follow, so that they keep the blank which decoders take from the first
        token."""
        return [token for token in self._tokens("a", add_special_tokens=False) if self.has_text(token)]

    def answer(self, prompt_token_ids: Sequence[int], output: RequestOutput) -> str:
        """A request's answer as text: cut before the stop string, and without the token that ended it."""
        if output.text is not None:
            return output.text
        tokens = output.output_token_ids
        if isinstance(output.stop_reason, int):
            tokens = tokens[:-1]
        return self.continuation([*prompt_token_ids, *tokens], len(prompt_token_ids))


def stop_text(tokenizer: Tokenizer) -> Callable[[Request], TextStop | None]:
    """For `Engine(stop_text=...)`: whether the newest token completes one of the request's stop strings in
    its answer, and which.

    Of several, the one that begins first counts. Only as many last tokens are decoded as the longest stop
    string can span, so the cost of a token does not grow with the answer.
    """

    def stopped(request: Request) -> TextStop | None:
        known, first, stops = request.token_ids, request.num_prompt_tokens, request.sampling.stop
        newest = known[-1]
        if not tokenizer.has_text(newest) or not _holds(_tail(tokenizer, known, first, stops), stops):
            return None
        text = tokenizer.continuation(known, first)
        found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if not found:  # an artefact of where the tail begins
            return None
        at, stop = min(found, key=lambda found: found[0])
        return TextStop(text[:at], stop)

    return stopped


def _tail(tokenizer: Tokenizer, known: Sequence[int], first: int, stops: tuple[str, ...]) -> str:
    """The end of the answer, long enough to hold any stop string that the newest token completes."""
    characters, size = _reach(stops)
    enough = characters + len(tokenizer.piece(known[-1]))
    span = size + 1  # a token is a byte or more, except those without text
    while True:
        start = max(first, len(known) - span)
        tail = tokenizer.continuation(known, start)
        if start == first or len(tail) >= enough:
            return tail
        span *= 2


def _holds(text: str, stops: tuple[str, ...]) -> bool:
    return any(stop in text for stop in stops)


@lru_cache(maxsize=1024)
def _reach(stops: tuple[str, ...]) -> tuple[int, int]:
    """Characters and bytes of the longest stop string."""
    return max(map(len, stops)), max(len(stop.encode("utf-8", "surrogatepass")) for stop in stops)
