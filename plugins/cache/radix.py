"""A radix tree over blocks."""

from __future__ import annotations

from dataclasses import dataclass

from headway import ROOT, Context, PrefixCache, Registry, Request, hookimpl


class Node:
    """An edge that holds a run of blocks: tokens[i*size:(i+1)*size] are the tokens of blocks[i]."""

    __slots__ = ("tokens", "blocks", "first", "parent", "children")

    def __init__(self, tokens: list[int], blocks: list[int], first: int, parent: Node | None) -> None:
        self.tokens, self.blocks = tokens, blocks
        self.first = first  # depth, in blocks, of blocks[0]
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}  # by the tokens of the child's first block


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two lists that differ. Halving compares slices, which C does faster than
    a loop here finds a token."""
    low, high = 0, len(a)  # equal before low, different before high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


@dataclass
class RadixTree(PrefixCache):
    """RadixAttention's index (SGLang, NeurIPS'24, section 3) over blocks: runs are compared whole and split
    on divergence.

    subtree: an eviction may take a block that others hang under, and takes them along; off, leaves go first,
    as in the paper.

    With block_size=1 it matches single tokens, as in the paper.
    """

    subtree: bool = False

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._size = ctx.block_size
        self._roots: dict[str, Node] = {}  # one tree a cache_salt
        self._where: dict[int, Node] = {}  # block -> the node that holds it
        self._depth: dict[int, int] = {}  # block -> its depth in blocks

    def match(self, request: Request, known: list[int], limit: int) -> list[int]:
        size, tokens = self._size, request.token_ids
        at = len(known)  # blocks matched so far
        node = self._where[known[-1]] if known else self._roots.get(request.cache_salt, _NOTHING)
        found: list[int] = []
        while at < limit:
            offset = at - node.first
            if offset == len(node.blocks):
                child = node.children.get(tuple(tokens[at * size : (at + 1) * size]))
                if child is None:
                    break
                node, offset = child, 0
            run = min(len(node.blocks) - offset, limit - at)
            ours = tokens[at * size : (at + run) * size]
            theirs = node.tokens[offset * size : (offset + run) * size]
            if ours != theirs:
                found += node.blocks[offset : offset + _common(ours, theirs) // size]
                break
            found += node.blocks[offset : offset + run]
            at += run
        return found

    def insert(self, request: Request, parent: int, tokens: tuple[int, ...], block: int) -> int:
        size = self._size
        if parent == ROOT:
            node, depth = self._roots.setdefault(request.cache_salt, Node([], [], 0, None)), 0
        else:
            node, depth = self._where[parent], self._depth[parent] + 1
        offset = depth - node.first
        if offset < len(node.blocks):
            if tuple(node.tokens[offset * size : (offset + 1) * size]) == tokens:
                return node.blocks[offset]
            self._split(node, offset)
        if tokens in node.children:
            return node.children[tokens].blocks[0]
        if node.blocks and not node.children:
            node.tokens += tokens
            node.blocks.append(block)
            self._where[block] = node
        else:
            self._where[block] = node.children[tokens] = Node(list(tokens), [block], depth, node)
        self._depth[block] = depth
        return block

    def _split(self, node: Node, offset: int) -> None:
        """Cuts the run before blocks[offset]; the tail becomes a child and keeps the children."""
        size = self._size
        tail = Node(node.tokens[offset * size :], node.blocks[offset:], node.first + offset, node)
        first = tuple(node.tokens[offset * size : (offset + 1) * size])
        tail.children, node.children = node.children, {first: tail}
        for child in tail.children.values():
            child.parent = tail
        del node.tokens[offset * size :], node.blocks[offset:]
        for block in tail.blocks:
            self._where[block] = tail

    def remove(self, block: int) -> None:
        node = self._where.pop(block)
        del self._depth[block]
        if node.blocks[-1] != block or node.children:
            raise KeyError(f"block {block} is not a leaf")
        node.blocks.pop()
        gone = tuple(node.tokens[-self._size :])
        del node.tokens[-self._size :]
        if not node.blocks and node.parent is not None:
            del node.parent.children[gone]


_NOTHING = Node([], [], 0, None)  # the tree of a salt that nobody has published under


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("cache", "radix", RadixTree)
