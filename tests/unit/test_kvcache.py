"""The block pool against vLLM V1's rules: one LRU queue, reference counts, nothing merged."""

from __future__ import annotations

import pytest

from llmd_sched.sim.kvcache import BlockPool, blocks_for


def filled(pool: BlockPool, hashes: list[int]) -> list[int]:
    """Blocks held by one sequence whose full blocks have these hashes."""
    blocks = pool.take([], len(hashes))
    assert blocks is not None
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.cache(block, block_hash)
    return blocks


def test_a_started_block_counts_as_a_block() -> None:
    assert [blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_usage_is_held_over_total_and_idle_cached_blocks_are_free() -> None:
    pool = BlockPool(4)
    blocks = filled(pool, [1, 2])
    assert (pool.held_blocks, pool.free_blocks, pool.usage) == (2, 2, 0.5)
    pool.release(blocks)
    assert (pool.held_blocks, pool.usage) == (0, 0.0)
    assert len(pool.longest_prefix([1, 2], 9)) == 2


def test_the_longest_prefix_stops_at_the_first_miss_and_at_the_cap() -> None:
    pool = BlockPool(8)
    blocks = filled(pool, [1, 2, 3])
    assert pool.longest_prefix([1, 2, 9, 3], 9) == blocks[:2]
    assert pool.longest_prefix([1, 2, 3], 1) == blocks[:1]
    assert pool.longest_prefix([2, 3], 9) == blocks[1:]  # hashes are chained, so a caller never asks this
    assert pool.longest_prefix([], 9) == []


def test_a_shared_block_is_free_only_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(3)
    first = filled(pool, [1, 2])
    second = pool.take(pool.longest_prefix([1, 2], 9), 1)
    assert second is not None
    assert second[:2] == first
    pool.release(first)
    assert pool.held_blocks == 3
    pool.release(second)
    assert pool.held_blocks == 0


def test_hits_that_were_idle_leave_the_middle_of_the_queue() -> None:
    pool = BlockPool(4)
    pool.release(filled(pool, [1, 2]))
    hits = pool.longest_prefix([1], 9)
    held = pool.take(hits, 2)
    assert held is not None
    # 2 and 3 were never used, so they come before block 1, the second of the released sequence.
    assert held == [0, 2, 3]
    assert pool.take([], 1) == [1]


def test_the_last_block_of_a_released_sequence_is_given_away_first() -> None:
    pool = BlockPool(3)
    pool.release(filled(pool, [1, 2, 3]))
    assert pool.take([], 1) == [2]
    assert len(pool.longest_prefix([1, 2, 3], 9)) == 2
    assert pool.take([], 1) == [1]
    assert len(pool.longest_prefix([1, 2, 3], 9)) == 1


def test_the_least_recently_released_sequence_is_evicted_first() -> None:
    pool = BlockPool(4)
    old, new = filled(pool, [1, 2]), filled(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    pool.take([], 2)
    assert pool.longest_prefix([1], 9) == []
    assert len(pool.longest_prefix([3, 4], 9)) == 2


def test_equal_content_is_held_twice_and_one_copy_outlives_the_other() -> None:
    pool = BlockPool(2)
    first, second = filled(pool, [7]), filled(pool, [7])
    assert pool.held_blocks == 2
    pool.release(first)
    assert pool.take([], 1) == [0]
    assert pool.longest_prefix([7], 9) == second


def test_taking_too_much_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.release(filled(pool, [1, 2]))
    hits = pool.longest_prefix([1, 2], 9)
    assert pool.take(hits, 2) is None  # two idle hits leave room for one
    assert (pool.held_blocks, pool.longest_prefix([1, 2], 9)) == (0, hits)
    assert pool.take(hits, 1) == [0, 1, 2]


def test_growing_adds_only_the_blocks_that_are_missing() -> None:
    pool = BlockPool(3)
    blocks = pool.take([], 1)
    assert blocks is not None
    assert pool.grow(blocks, 16)
    assert len(blocks) == 1
    assert pool.grow(blocks, 33)
    assert len(blocks) == 3
    assert not pool.grow(blocks, 49)
    assert len(blocks) == 3
