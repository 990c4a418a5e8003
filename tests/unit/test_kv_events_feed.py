"""Events applied: our keys from the engines' tokens, whatever their blocks are like, and what is skipped is counted."""

from __future__ import annotations

import numpy as np
import pytest

from llmd_sched.prefix import feed as feed_module
from llmd_sched.prefix.blockindex import MAX_TIERS, BlockIndex
from llmd_sched.prefix.blocks import BlockKeys, Extras
from llmd_sched.prefix.events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event
from llmd_sched.prefix.feed import Engine, Feed, Skip

BLOCK = 4
TOKENS = list(range(100, 200))


def stored(
    hashes: list[int | bytes], parent: int | bytes | None = None, first: int = 0, size: int = BLOCK, **fields: object
) -> BlockStored:
    """Blocks whose tokens are those of TOKENS from block ``first`` on."""
    tokens = TOKENS[first * size : (first + len(hashes)) * size]
    return BlockStored(hashes, parent, tokens, size, **{"medium": "GPU", **fields})


class Bench:
    """A feed with one engine, and what of TOKENS it is known to hold."""

    def __init__(self, block_tokens: int = BLOCK) -> None:
        self.keys = BlockKeys(block_tokens=block_tokens)
        self.index = BlockIndex(10_000, {"gpu": 1.0, "cpu": 0.8})
        self.feed, self.engine = Feed(self.index, self.keys), Engine(0)

    def apply(self, *events: Event, model: str = "m", engine: Engine | None = None) -> None:
        self.feed.apply(engine or self.engine, model, Batch(list(events)))

    def held(self, model: str = "m", extras: Extras | None = None, number: int = 0) -> int:
        tokens = np.array(TOKENS, dtype=np.uint32)
        chain = self.keys.chain(tokens, self.keys.root(model), extras or {})
        return int(self.index.match(chain, 4).blocks[number])

    @property
    def skips(self) -> dict[tuple[str, str], int]:
        counts = self.feed.counts
        return dict(counts.stores_skipped) | dict(counts.removals_skipped)


def test_blocks_are_held_from_their_event_to_their_removal() -> None:
    bench = Bench()
    bench.apply(stored([1, 2]), stored([3], parent=2, first=2))
    assert bench.held() == 3
    bench.apply(BlockRemoved([3], "GPU"))
    assert bench.held() == 2
    bench.apply(BlockRemoved([1, 2]))  # no medium is the GPU
    assert (bench.held(), len(bench.index), len(bench.engine.blocks)) == (0, 0, 0)
    counts = bench.feed.counts
    assert (counts.batches, counts.stored, counts.removed) == (3, 3, 3)


def test_hashes_may_be_bytes() -> None:
    bench = Bench()
    sha = [bytes([n]) * 32 for n in (1, 2)]
    bench.apply(stored([sha[0]]), stored([sha[1]], parent=sha[0], first=1))
    assert bench.held() == 2
    bench.apply(BlockRemoved([sha[1]]))
    assert bench.held() == 1


def test_a_parent_of_0_is_none_unless_it_is_a_block() -> None:
    bench = Bench()
    bench.apply(stored([0], parent=0), stored([2], parent=0, first=1))
    assert bench.held() == 2


def test_blocks_behind_an_unknown_parent_are_dropped_and_counted() -> None:
    bench = Bench()
    bench.apply(stored([5, 6], parent=4, first=1))
    assert len(bench.index) == 0
    assert bench.skips == {("unspecified", Skip.PARENT): 2}


def test_an_unknown_removal_is_counted() -> None:
    bench = Bench()
    bench.apply(BlockRemoved([5, 6]))
    assert bench.skips == {("unspecified", Skip.BLOCK): 2}


def test_tokens_that_do_not_fill_the_blocks_are_counted() -> None:
    bench = Bench()
    bench.apply(BlockStored([1, 2], None, TOKENS[:7], 4))
    assert bench.skips == {("unspecified", Skip.TOKENS): 2}
    assert len(bench.index) == 0


def test_an_event_without_tokens_moves_known_blocks_to_one_more_tier() -> None:
    bench = Bench()
    bench.apply(stored([1, 2]), BlockStored([1, 9], None, [], 4, medium="CPU"))
    assert bench.skips == {("unspecified", Skip.BLOCK): 1}
    bench.apply(BlockRemoved([1, 2], "GPU"))
    assert bench.held() == 1
    chain = bench.keys.chain(np.array(TOKENS, dtype=np.uint32), bench.keys.root("m"))
    assert bench.index.match(chain, 1).weighted.tolist() == [0.8]
    bench.apply(stored([2], parent=1, first=1), BlockRemoved([1], "CPU"))
    assert bench.held() == 0
    assert bench.index.holds(0, chain[1])


def test_a_block_stored_twice_goes_with_its_second_removal() -> None:
    bench = Bench()
    bench.apply(stored([1, 2]), stored([1, 2]), BlockRemoved([1, 2]))
    assert bench.held() == 2
    bench.apply(BlockRemoved([1, 2]))
    assert bench.held() == 0


def test_clearing_forgets_one_engine_alone() -> None:
    bench, other = Bench(), Engine(1)
    bench.apply(stored([1, 2]))
    bench.apply(stored([1, 2]), engine=other)
    bench.apply(AllBlocksCleared())
    assert (bench.held(), bench.held(number=1)) == (0, 2)
    assert bench.feed.counts.cleared == 1
    bench.apply(stored([3], parent=2, first=2))
    assert bench.skips == {("unspecified", Skip.PARENT): 1}


def test_an_adapter_stands_for_the_model_and_one_without_a_name_for_nothing() -> None:
    bench = Bench()
    bench.apply(stored([1], lora_id=1, lora_name="adapter", extra_keys=[["adapter"]]))
    bench.apply(stored([2], lora_id=2))
    assert (bench.held("m"), bench.held("adapter")) == (0, 1)
    assert bench.skips == {("unspecified", Skip.ADAPTER): 1}


def test_salts_and_images_taint_their_blocks() -> None:
    bench = Bench()
    bench.apply(stored([1, 2, 3], extra_keys=[["salt"], None, [["image", 2]]]))
    assert bench.held() == 0
    assert bench.held(extras={0: ("salt",)}) == 2
    assert bench.held(extras={0: ("salt",), 2: ("image",)}) == 3


@pytest.mark.parametrize("kind", ["full_attention", "mla_attention", "sink_full_attention", None])
def test_groups_that_keep_the_whole_prefix_are_indexed(kind: str | None) -> None:
    bench = Bench()
    bench.apply(stored([1], group_idx=3, kv_cache_spec_kind=kind), BlockRemoved([9], "GPU", 3))
    assert bench.held() == 1
    assert bench.skips == {("unspecified", Skip.BLOCK): 1}


@pytest.mark.parametrize(
    ("kind", "label"), [("sliding_window", "sliding_window"), ("mamba", "mamba"), ("x" * 99, "other")]
)
def test_other_groups_are_skipped_with_their_removals(kind: str, label: str) -> None:
    bench = Bench()
    bench.apply(stored([1], group_idx=0, kv_cache_spec_kind="full_attention"))
    bench.apply(stored([1, 2], group_idx=1, kv_cache_spec_kind=kind), BlockRemoved([1], "GPU", 1))
    assert bench.held() == 1
    assert dict(bench.feed.counts.stores_skipped) == {(label, Skip.GROUP): 2}
    assert dict(bench.feed.counts.removals_skipped) == {(label, Skip.GROUP): 1}


@pytest.mark.parametrize(("engine_size", "ours"), [(4, 4), (8, 4), (4, 8), (4, 16), (6, 4), (4, 6), (16, 4), (12, 8)])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_block_sizes_need_not_agree(engine_size: int, ours: int, at_once: int) -> None:
    bench = Bench(ours)
    hashes = [1000 + i for i in range(96 // engine_size)]
    for first in range(0, len(hashes), at_once):
        part = hashes[first : first + at_once]
        bench.apply(stored(part, parent=hashes[first - 1] if first else None, first=first, size=engine_size))
        assert bench.held() == (first + len(part)) * engine_size // ours
    for left in reversed(range(len(hashes))):
        bench.apply(BlockRemoved([hashes[left]]))
        assert bench.held() == left * engine_size // ours
    assert (len(bench.index), len(bench.engine.blocks)) == (0, 0)
    assert bench.skips == {}


def test_a_block_of_ours_comes_back_when_its_last_part_does() -> None:
    bench = Bench(2 * BLOCK)
    bench.apply(stored([1, 2, 3, 4]), BlockRemoved([4]))
    assert bench.held() == 1
    bench.apply(stored([4], parent=3, first=3))
    assert bench.held() == 2


@pytest.mark.parametrize("at_once", [1, 4])
def test_extras_of_smaller_blocks_taint_the_larger_one_they_begin_in(at_once: int) -> None:
    bench = Bench(2 * BLOCK)
    keys = [["salt"], ["image"], None, ["image"]]
    for first in range(0, 4, at_once):
        hashes = [1 + first + i for i in range(at_once)]
        bench.apply(stored(hashes, first or None, first, extra_keys=keys[first : first + at_once]))
    assert bench.held(extras={0: ("salt", "image"), 1: ("image",)}) == 2
    assert bench.held(extras={0: ("salt", "image")}) == 1


def test_a_salt_of_a_larger_block_is_of_the_first_smaller_one() -> None:
    bench = Bench()
    bench.apply(stored([1], size=2 * BLOCK, extra_keys=[["salt"]]))
    assert bench.held(extras={0: ("salt",)}) == 2


def test_an_engine_has_a_bounded_number_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_ENGINE_BLOCKS", 6)
    monkeypatch.setattr(feed_module, "SWEEP", 2)
    bench = Bench()
    bench.apply(stored([1, 2, 3, 4, 5, 6]), stored([7], parent=6, first=6))
    assert list(bench.engine.blocks) == [3, 4, 5, 6, 7]
    assert (bench.held(), len(bench.index)) == (0, 5)


def test_media_beyond_the_bound_are_counted() -> None:
    bench = Bench()
    bench.apply(*(stored([1], medium=f"tier{i}") for i in range(MAX_TIERS + 1)))
    assert bench.skips == {("unspecified", Skip.TIER): 1}
    bench.apply(BlockStored([1], None, [], BLOCK, medium="one more"))
    assert bench.skips == {("unspecified", Skip.TIER): 2}


def test_malformed_events_are_carried_into_the_counts() -> None:
    bench = Bench()
    bench.feed.apply(bench.engine, "m", Batch([], 0, 3))
    assert bench.feed.counts.malformed_events == 3
