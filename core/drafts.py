"""Drafts: guesses of the tokens behind a request's last one, which a step may verify with it."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import BlockPool
from .request import Request
from .roles import Roles
from .roster import Roster


def plannable(
    roles: Roles,
    roster: Roster,
    pool: BlockPool,
    *,
    request: Request,
    drafts: Sequence[int],
    most: int,
) -> Sequence[int]:
    """Those of the drafts, at most `most`, that can be in the step: blocks for them are taken from nobody who
    runs, and none is wasted behind the end of the answer."""
    caps, known = roles.executor.caps, len(request.token_ids)
    if not all(isinstance(token, int) and 0 <= token < caps.vocab_size for token in drafts):
        expected = f"expected token ids below {caps.vocab_size}"
        raise roles.calls.refusal(roles.scheduler, f"add(drafts={drafts!r}): {expected}", request)
    if request.num_new_tokens != 1 or request.num_tokens != known:
        return ()  # a chunk of a prompt, or its next token is being sampled
    available = max(0, pool.num_available - roster.num_reserved_blocks)
    room = pool.layout.num_tokens(len(request.block_table) + available) - known
    return drafts[: max(0, min(most, caps.max_drafts, room, request.max_num_tokens - 1 - known))]
