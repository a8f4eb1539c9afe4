"""What the cache-aware orders of SGLang share: the prefix that a request would hit, and who should wait for another's prefix."""

from __future__ import annotations

from array import array

from headway import Context, Order, Request, View

HEAD = 32  # tokens; SGLang's IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD and _DEPRIORITIZE_THRESHOLD
FCFS_ABOVE = 128  # waiting requests; beyond that SGLang turns prefix matching off


class PrefixOrder(Order):
    """Base of orders that look at the prefix match of every waiting request, at most `window` of them."""

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._heads: dict[int, bytes] = {}  # waiting request index -> its first HEAD tokens, "" where it is shorter

    def matches(self, view: View) -> list[tuple[bool, int, Request]]:
        """For every waiting request: (wait for another one's prefix, cached tokens, the request).

        If several requests share a prefix of HEAD tokens that is not cached, only the first should go now: when it is done, the
        others hit.
        """
        found, seen = [], set()
        for request in view.waiting:
            cached, later = view.match(request).num_tokens, False
            if cached <= HEAD and (head := self._heads[request.index]):
                later = head in seen
                seen.add(head)
            found.append((later, cached, request))
        return found

    def on_arrival(self, request: Request, now: float) -> None:
        short = request.num_tokens < HEAD
        self._heads[request.index] = b"" if short else request.cache_salt.encode() + array("q", request.token_ids[:HEAD]).tobytes()

    on_preempt = on_arrival

    def on_admit(self, request: Request, now: float) -> None:
        self._heads.pop(request.index, None)

    on_finish = on_admit
