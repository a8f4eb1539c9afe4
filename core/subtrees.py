"""Subtrees: what hangs under a cached block, for a cache whose blocks may go with all of it."""

from __future__ import annotations

from collections.abc import Iterator


class Subtrees:
    """Children of cached blocks by number, in the order of publishing."""

    def __init__(self) -> None:
        self._children: dict[int, dict[int, None]] = {}

    def add(self, parent: int, child: int) -> None:
        self._children.setdefault(parent, {})[child] = None

    def remove(self, parent: int, child: int) -> None:
        children = self._children[parent]
        del children[child]
        if not children:
            del self._children[parent]

    def below(self, root: int) -> Iterator[int]:
        """All that hangs under a block, those with nothing under them first; as it is now."""
        found: list[int] = []
        at = [root]
        while at:
            children = self._children.get(at.pop(), ())
            found += children
            at += children
        return reversed(found)

    def clear(self) -> None:
        self._children.clear()
