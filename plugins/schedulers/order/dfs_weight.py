"""Depth first through the shared prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from headway import Order, Registry, Request, View, hookimpl, param

Path = tuple[Sequence[int], int, Request]  # cached blocks of the prefix, place in the queue, the request


@dataclass
class DepthFirstWeight(Order):
    """SGLang's dfs-weight (Zheng et al., NeurIPS'24, section 3): walk the cache tree depth first, heaviest
    subtree first.

    The weight of a subtree is the number of waiting requests that would hit it, so requests that share a
    prefix run one after the other while it is hot. A node's own requests come after those below it, as in
    SGLang. window: oldest waiting requests that are looked at in a step.
    """

    may_starve = "requests that share a hot prefix may keep coming"
    window: int = param(256, min=1, max=1_000_000, unit="requests")

    def order(self, view: View) -> Iterable[Request]:
        paths = [
            (view.match(request).blocks, i, request)
            for i, request in enumerate(islice(view.waiting, self.window))
        ]
        paths.sort(key=lambda path: list(path[0]))  # neighbours share the longest prefixes
        found: list[Request] = []
        # (depth that all of these share, in blocks; the paths)
        pending: list[tuple[int, list[Path]]] = [(0, paths)]
        while pending:
            depth, group = pending.pop()
            if len(group) > 1:
                depth = _common(group[0][0], group[-1][0], depth)
            own = [path for path in group if len(path[0]) == depth]
            if len(own) == len(group):
                found += [request for _, _, request in sorted(own, key=lambda path: path[1])]
                continue
            children: dict[int, list[Path]] = {}
            for path in group:
                if len(path[0]) > depth:
                    children.setdefault(path[0][depth], []).append(path)
            if own:
                pending.append((depth, own))
            # Last in, first out: the heaviest child is pushed last; among equals, the one that holds the
            # oldest request.
            heaviest = sorted(
                children.values(), key=lambda child: (-len(child), min(path[1] for path in child))
            )
            pending += [
                (depth + 1 if len(child) > 1 else len(child[0][0]), child) for child in reversed(heaviest)
            ]
        return found


def _common(a: Sequence[int], b: Sequence[int], depth: int) -> int:
    """Length of the common prefix of a and b, which is at least `depth`."""
    most = min(len(a), len(b))
    while depth < most and a[depth] == b[depth]:
        depth += 1
    return depth


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("order", "dfs_weight", DepthFirstWeight)
