"""What the cache-aware orders of SGLang share: the prefix that a request would hit, and who should wait for
another's prefix."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from headway import Context, Order, Request, View, param

HEAD = 32  # tokens; SGLang's IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD and _DEPRIORITIZE_THRESHOLD


@dataclass
class PrefixOrder(Order):
    """Base of orders that look at the prefix match of every waiting request; first come first served above
    `fcfs_above` of them."""

    fcfs_above: int = param(
        128,
        min=0,
        max=1_000_000,
        unit="requests",
        doc="beyond that SGLang turns prefix matching off",
    )

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        # waiting request index -> its first HEAD tokens, "" where it is shorter
        self._heads: dict[int, bytes] = {}

    def order(self, view: View) -> Iterable[Request]:
        if view.num_waiting > self.fcfs_above:
            return view.waiting
        return [request for _, _, request in sorted(self._matches(view), key=lambda match: self.rank(*match))]

    def rank(self, later: bool, cached: int, request: Request) -> Any:
        """Smallest first, among equals the oldest. later: it should wait for another one's prefix; cached:
        tokens."""
        raise NotImplementedError

    def _matches(self, view: View) -> list[tuple[bool, int, Request]]:
        """If several requests share a prefix of HEAD tokens that is not cached, only the first should go now:
        when it is done, the others hit."""
        matches, seen = [], set()
        for request in view.waiting:
            cached, later = view.match(request).num_tokens, False
            if cached <= HEAD and (head := self._heads[request.index]):
                later = head in seen
                seen.add(head)
            matches.append((later, cached, request))
        return matches

    def on_arrival(self, request: Request, now: float) -> None:
        short = request.num_tokens < HEAD
        self._heads[request.index] = (
            b"" if short else request.cache_salt.encode() + array("q", request.token_ids[:HEAD]).tobytes()
        )

    on_preempt = on_arrival

    def on_admit(self, request: Request, now: float) -> None:
        self._heads.pop(request.index, None)

    on_finish = on_admit
