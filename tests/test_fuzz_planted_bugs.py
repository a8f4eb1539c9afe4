"""The fuzz can fail: bugs planted one by one in the core and the caches are each found within a few hundred
seeds."""

from __future__ import annotations

import inspect
import sys
import textwrap
from types import ModuleType

import pytest

from core import blocks, matching, pins, room, roster, step
from core.testing.subject import Subject
from core.testing.trial import Trial
from plugins.cache import hash as hash_cache
from plugins.cache import radix

SEEDS = 400


def plant(monkeypatch, owner: type | ModuleType, method: str, right: str, wrong: str) -> None:
    """Replaces `right` by `wrong` in the source of a method, or of a function of a module."""
    source = textwrap.dedent(inspect.getsource(inspect.getattr_static(owner, method)))
    assert source.count(right) == 1, (
        f"{owner.__name__}.{method} no longer holds {right!r} once: plant the bug anew"
    )
    scope: dict = {}
    code = compile(
        "from __future__ import annotations\n" + source.replace(right, wrong), f"<planted {method}>", "exec"
    )
    exec(code, vars(owner if isinstance(owner, ModuleType) else sys.modules[owner.__module__]), scope)
    monkeypatch.setattr(owner, method, scope[method])


def first_failure(words: tuple[str, ...] = ()):
    subject = Subject(words)
    for seed in range(SEEDS):
        outcome = Trial(subject.case(seed), subject.roles).run()
        if outcome.failure:
            return seed, outcome.failure
    return None


#: name -> (class or module, method, source, planted source)
BUGS = {
    "publish before compute": (
        roster.Roster,
        "schedule",
        "sample = start + n - drafts == request.num_tokens",
        "sample = start + n - drafts == request.num_tokens; self._pool.cache.enabled and "
        "publish(self._pool, request, min(start + n, len(request.token_ids)) // self._pool.block_size)",
    ),
    "free while referenced": (blocks.BlockPool, "release", "block.ref_count -= 1", "block.ref_count = 0"),
    "free while in flight": (roster.Roster, "_give_back", "if request.num_steps_in_flight:", "if False:"),
    "dropped while in flight": (
        pins.Pins,
        "drop",
        "self._dropped.add(request.index)",
        "self._pool.release(request.block_table); request.block_table = []",
    ),
    "stale hash after eviction": (
        hash_cache.HashBlocks,
        "remove",
        "if self._by_key.get(key) == block:",
        "if False:",
    ),
    "stale radix leaf after eviction": (
        radix.RadixTree,
        "remove",
        "if not node.blocks and node.parent is not None:",
        "if False:",
    ),
    "last token matched": (
        matching.Matches,
        "match",
        "num_full_blocks(request.num_tokens - 1)",
        "num_full_blocks(request.num_tokens)",
    ),
    "double free": (
        roster.Roster,
        "_release",
        "pool.release(table[keep:], request.tags)",
        "pool.release([*table[keep:], *table[keep:]], request.tags)",
    ),
    "freed twice on the free list": (
        blocks.BlockPool,
        "release",
        "self.free_blocks.append(id)",
        "self.free_blocks += [id, id]",
    ),
    "remap of a running table": (
        roster,
        "publish",
        "request.canonical_blocks[index] = canonical",
        "request.canonical_blocks[index] = canonical; table[index] = canonical",
    ),
    "missing twin reference": (
        blocks.BlockPool,
        "publish",
        "self.acquire((canonical,), request.tags, hit=False)",
        "pass",
    ),
    "twin never given back": (
        roster.Roster,
        "_release",
        "pool.release([twins.pop(i) for i in sorted(twins) if i >= keep], request.tags)",
        "[twins.pop(i) for i in sorted(twins) if i >= keep]",
    ),
    "wrong parent": (roster, "publish", "parent = canonical", "parent = table[index]"),
    "wrong parent after drop_tail": (
        roster.Roster,
        "_release",
        "twins.get(keep - 1, table[keep - 1]) if keep else ROOT",
        "ROOT",
    ),
    "generation not bumped": (blocks.BlockPool, "_evict_block", "block.generation += 1", "pass"),
    "version not bumped": (blocks.BlockPool, "_cached", "above.version += 1", "pass"),
    "root version not bumped": (blocks.BlockPool, "_cached", "self.root_version += 1", "pass"),
    "parent evicted before its child": (
        blocks.BlockPool,
        "release",
        "if block.num_children == 0 or self._whole:",
        "if True:",
    ),
    "parent not evictable after its child": (
        blocks.BlockPool,
        "_evict_block",
        "if above.num_children == 0 and above.ref_count == 0:",
        "if False:",
    ),
    "evictable count drifts": (blocks.BlockPool, "acquire", "self.num_evictable -= 1", "pass"),
    "cached block still evictable when hit": (
        blocks.BlockPool,
        "acquire",
        "call(eviction, eviction.on_in_use, block)",
        "pass",
    ),
    "paused block handed out while it is kept": (
        roster.Roster,
        "pause",
        "self.paused.add(request)",
        "self.paused.add(request); self._pool.release(request.block_table[-1:])",
    ),
    "paused request thought to have lost its blocks": (
        roster.Roster,
        "commit",
        "if request.state is _RUNNING or request.state is _PAUSED:",
        "if request.state is _RUNNING:",
    ),
    "paused request taken twice": (
        roster.Roster,
        "take_paused",
        "self.paused.remove(request)",
        "self._release(request)",
    ),
    "paused request starts on its own blocks": (
        room.Room,
        "for_start",
        "if other is not request and not",
        "if not",
    ),
    "a pause forgets what was computed before a preemption": (
        roster.Roster,
        "admit",
        "self.paused.remove(request)",
        "self.paused.remove(request); request.planned_from = cached",
    ),
    "paused request taken while its step is in flight": (
        roster.Roster,
        "take_paused",
        "self._give_back(request)",
        "self._release(request)",
    ),
    "preempted in its own step": (room.Room, "for_running", "if planned:", "if False:"),
    "token budget not charged": (step.StepBuilder, "_append", "self.tokens_left -= n", "pass"),
    "hits counted again after preemption": (roster.Roster, "admit", "if first:", "if True:"),
    "matched blocks handed out again": (room.Room, "_missing", "- idle - self", "- self"),
    "partial block published": (
        roster.Roster,
        "commit",
        "publish(self._pool, request, min(computed, len(request.token_ids)) // size)",
        "publish(self._pool, request, -(-min(computed, len(request.token_ids)) // size))",
    ),
    "one token computed too few": (
        roster.Roster,
        "commit",
        "request.num_computed_tokens = computed",
        "request.num_computed_tokens = computed - (length > 3)",
    ),
    "token of a preempted request lost": (
        roster.Roster,
        "commit",
        "if request.state is not _PREEMPTED:",
        "if True:",
    ),
    "ended request keeps its pin of drop_tail": (
        roster.Roster,
        "_give_all_back",
        "self.kept_heads.pop(request.index, None)",
        "pass",
    ),
    "planned past max_tokens": (
        step.StepBuilder,
        "_add_running",
        "if request.num_tokens >= request.max_num_tokens:",
        "if False:",
    ),
    "hash compares no parents": (
        hash_cache.HashBlocks,
        "insert",
        "chain_key(self._content[parent][0], tokens), parent, tokens",
        "hash(tokens), parent, tokens",
    ),
    "radix keeps one tree for all salts when it publishes": (
        radix.RadixTree,
        "insert",
        "request.cache_salt",
        '""',
    ),
    "radix keeps one tree for all salts when it matches": (
        radix.RadixTree,
        "match",
        "request.cache_salt",
        '""',
    ),
    "radix split forgets its children": (
        radix.RadixTree,
        "_split",
        "tail.children, node.children = node.children,",
        "_, node.children = node.children,",
    ),
    "radix compares no tokens": (radix.RadixTree, "match", "if ours != theirs:", "if False:"),
    "radix matches a block too many": (
        radix.RadixTree,
        "match",
        "_common(ours, theirs) // size",
        "-(-_common(ours, theirs) // size)",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch) -> None:
    plant(monkeypatch, *BUGS[bug])
    found = first_failure()
    assert found, f"{SEEDS} seeds pass with the bug"


def test_without_a_bug_the_same_seeds_pass() -> None:
    assert first_failure() is None
