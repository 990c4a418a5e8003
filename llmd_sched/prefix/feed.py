"""KV events of the engines -> the block index: keys recomputed from token ids, batches in order, restarts noticed.

An engine names blocks by hashes of its own; an event's tokens, and the key its parent had here, give ours. Block sizes
need not agree: a key of ours belongs to the engine block whose tokens complete it and goes when that one is removed,
and tokens that do not fill a block of ours yet wait for those of the engine's next block.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, assert_never

import msgspec
import numpy as np

from llmd_sched.prefix.blockindex import BlockIndex
from llmd_sched.prefix.blocks import NO_EXTRAS, BlockKeys, Tokens
from llmd_sched.prefix.events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event, numbers

MAX_ENGINE_BLOCKS = 1 << 20
"""Of one endpoint, beyond which the oldest are forgotten: 16 million tokens in blocks of 16."""

MAX_GROUPS = 64
"""Cache groups of one endpoint that are remembered as not indexed."""

SWEEP = 1 << 12
DEFAULT_TIER = "gpu"

INDEXED_KINDS = ("full_attention", "mla_attention", "sink_full_attention")
"""Of a hybrid cache's groups: only where every token of a prefix is kept can a block stand for the whole prefix."""

OTHER_KINDS = ("sliding_window", "sliding_window_mla", "chunked_local_attention", "mamba", "cross_attention")
UNKNOWN_KIND, UNSPECIFIED_KIND = "other", "unspecified"


class Skip(enum.StrEnum):
    """Why a block was not taken in, or not taken out."""

    GROUP = "cache_kind"
    """Its cache group keeps less than the whole prefix."""
    PARENT = "unknown_parent"
    BLOCK = "unknown_block"
    """Nobody told of it before: stored before we listened, or not taken in."""
    ADAPTER = "unnamed_adapter"
    """An adapter's, of which only the engine's number is known."""
    TOKENS = "token_count"
    """Its tokens are not as many as its blocks hold."""
    TIER = "too_many_tiers"


class Counts(msgspec.Struct):
    """Since the start; every number only grows."""

    batches: int = 0
    malformed_batches: int = 0
    malformed_events: int = 0
    stored: int = 0
    """Engine blocks taken in, tier updates too."""
    removed: int = 0
    cleared: int = 0
    """Times an endpoint said that all its blocks are gone."""
    restarts: int = 0
    gaps: int = 0
    missed_batches: int = 0
    repeated_batches: int = 0
    unknown_endpoints: int = 0
    """Batches of someone who is not in the pool, or whose topic cannot be read."""
    stores_skipped: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)
    """(kind of cache, reason) -> engine blocks."""
    removals_skipped: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)


class _Block(NamedTuple):
    """An engine's block whose end is not the end of one of ours, or that completes several."""

    keys: tuple[int, ...]
    """Those it completes."""
    parent: int
    """The last key at or before its end."""
    rest: Tokens
    """Tokens after that key's block."""
    texts: tuple[str, ...]
    """Extras of the block that the rest begins."""


class Engine:
    """What one endpoint calls its blocks."""

    def __init__(self, number: int) -> None:
        self.number = number
        """In the index."""
        self.blocks: dict[int, int | _Block] = {}
        """Hash -> our key, where both blocks are the same tokens."""
        self.groups: dict[int, str] = {}
        """Cache groups that are not indexed -> their kind."""


class Feed:
    """Applies batches to the index."""

    def __init__(self, index: BlockIndex, keys: BlockKeys) -> None:
        self.index, self.keys = index, keys
        self.counts = Counts()

    def apply(self, engine: Engine, model: str, batch: Batch) -> int:
        """Returns about how many blocks were dealt with, a measure of the time it took."""
        self.counts.batches += 1
        self.counts.malformed_events += batch.malformed
        return sum(self._apply(engine, model, event) for event in batch.events)

    def _apply(self, engine: Engine, model: str, event: Event) -> int:
        if isinstance(event, BlockStored):
            self._store(engine, model, event)
            return len(event.block_hashes)
        if isinstance(event, BlockRemoved):
            self._remove(engine, event)
            return len(event.block_hashes)
        if isinstance(event, AllBlocksCleared):
            self.counts.cleared += 1
            return self.clear(engine)
        assert_never(event)

    def clear(self, engine: Engine) -> int:
        """Forget all the endpoint holds; returns how many blocks that were."""
        held = len(engine.blocks)
        self.index.forget(engine.number)
        engine.blocks.clear()
        engine.groups.clear()
        return held

    def _store(self, engine: Engine, model: str, event: BlockStored) -> None:
        kind = event.kv_cache_spec_kind
        if kind is not None and kind not in INDEXED_KINDS:
            kind = kind if kind in OTHER_KINDS else UNKNOWN_KIND
            if event.group_idx is not None and len(engine.groups) < MAX_GROUPS:
                engine.groups[event.group_idx] = kind
            self._skip_store(event, Skip.GROUP, kind)
        elif not event.token_ids:
            self._move(engine, event)
        elif len(event.token_ids) != len(event.block_hashes) * event.block_size:
            self._skip_store(event, Skip.TOKENS)
        elif event.lora_id is not None and event.lora_name is None:
            self._skip_store(event, Skip.ADAPTER)
        else:
            self._extend(engine, event.lora_name or model, event)

    def _skip_store(self, event: BlockStored, reason: Skip, kind: str = "") -> None:
        kind = kind or event.kv_cache_spec_kind or UNSPECIFIED_KIND
        self.counts.stores_skipped[kind, reason] += len(event.block_hashes)

    def _move(self, engine: Engine, event: BlockStored) -> None:
        """Blocks known already are now on one more medium."""
        known = [engine.blocks[h] for h in numbers(event.block_hashes) if h in engine.blocks]
        keys = [key for block in known for key in _keys(block)]
        if not self.index.add(engine.number, _tier(event.medium), keys):
            self._skip_store(event, Skip.TIER)
            return
        self.counts.stored += len(known)
        unknown = len(event.block_hashes) - len(known)
        if unknown:
            self.counts.stores_skipped[event.kv_cache_spec_kind or UNSPECIFIED_KIND, Skip.BLOCK] += unknown

    def _extend(self, engine: Engine, model: str, event: BlockStored) -> None:
        """New blocks behind their parent."""
        start = self._start(engine, model, event)
        if start is None:
            self._skip_store(event, Skip.PARENT)
            return
        hashes, size, ours = numbers(event.block_hashes), event.block_size, self.keys.block_tokens
        tokens = np.array(event.token_ids, dtype=np.uint32)
        if len(start.rest):
            tokens = np.concatenate((start.rest, tokens))
        extras = _in_our_blocks(start, event, ours) if event.extra_keys or start.texts else NO_EXTRAS
        keys = self.keys.chain(tokens, start.parent, extras)
        if not self.index.add(engine.number, _tier(event.medium), keys):
            self._skip_store(event, Skip.TIER)
            return
        if size == ours and not len(start.rest):
            engine.blocks.update(zip(hashes, keys, strict=True))
        else:
            engine.blocks.update(zip(hashes, self._uneven(start, event, keys, tokens), strict=True))
        self.counts.stored += len(hashes)
        if len(engine.blocks) > MAX_ENGINE_BLOCKS:
            self._forget_oldest(engine)

    def _uneven(self, start: _Block, event: BlockStored, keys: list[int], tokens: Tokens) -> Iterator[_Block]:
        """The event's blocks, where they are not ours one by one."""
        ours, extras = self.keys.block_tokens, event.extras()
        at, done, texts = len(start.rest), 0, start.texts
        for i in range(len(event.block_hashes)):
            at += event.block_size
            before, done = done, at // ours
            texts = () if done > before else texts + extras.get(i, ())
            parent = keys[done - 1] if done else start.parent
            yield _Block(tuple(keys[before:done]), parent, tokens[done * ours : at].copy(), texts)

    def _start(self, engine: Engine, model: str, event: BlockStored) -> _Block | None:
        """What the first block follows; None when that is not known."""
        if event.parent_block_hash is None:
            return _Block((), self.keys.root(model), _NO_TOKENS, ())
        (parent,) = numbers([event.parent_block_hash])
        block = engine.blocks.get(parent)
        if block is None and not parent:  # some engines say 0 for none
            return _Block((), self.keys.root(model), _NO_TOKENS, ())
        return _Block((), block, _NO_TOKENS, ()) if isinstance(block, int) else block

    def _remove(self, engine: Engine, event: BlockRemoved) -> None:
        kind = engine.groups.get(event.group_idx) if event.group_idx is not None else None
        if kind is not None:
            self.counts.removals_skipped[kind, Skip.GROUP] += len(event.block_hashes)
            return
        tier, unknown = _tier(event.medium), 0
        for h in numbers(event.block_hashes):
            block = engine.blocks.get(h)
            if block is None:
                unknown += 1
                continue
            keys = _keys(block)
            self.index.remove(engine.number, tier, keys)
            if not any(self.index.holds(engine.number, key) for key in keys):
                del engine.blocks[h]
        self.counts.removed += len(event.block_hashes) - unknown
        if unknown:
            self.counts.removals_skipped[UNSPECIFIED_KIND, Skip.BLOCK] += unknown

    def _forget_oldest(self, engine: Engine) -> None:
        for h in list(islice(engine.blocks, SWEEP)):
            self.index.drop(engine.number, _keys(engine.blocks.pop(h)))


_NO_TOKENS: Tokens = np.zeros(0, dtype=np.uint32)


def _keys(block: int | _Block) -> tuple[int, ...]:
    return (block,) if isinstance(block, int) else block.keys


def _tier(medium: str | None) -> str:
    return medium.lower() if medium else DEFAULT_TIER


def _in_our_blocks(start: _Block, event: BlockStored, block_tokens: int) -> dict[int, tuple[str, ...]]:
    """The event's extras by blocks of ours: an engine block's go to the one it begins in, each text once."""
    texts: dict[int, dict[str, None]] = {0: dict.fromkeys(start.texts)}
    for i, more in event.extras().items():
        into = (len(start.rest) + i * event.block_size) // block_tokens
        texts.setdefault(into, {}).update(dict.fromkeys(more))
    return {i: tuple(found) for i, found in texts.items() if found}
