"""The index of blocks by holder: contiguous runs, tiers, counts and bounds, against a plain model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmd_sched.prefix.blockindex import MAX_TIERS, ROWS, BlockIndex

WEIGHTS = {"gpu": 1.0, "cpu": 0.8, "nothing": 0.0}


def index_of(*held: tuple[int, str, list[int]], size: int = 1000) -> BlockIndex:
    index = BlockIndex(size, WEIGHTS)
    for endpoint, tier, keys in held:
        assert index.add(endpoint, tier, keys)
    return index


def blocks(index: BlockIndex, keys: list[int], endpoints: int) -> list[float]:
    return index.match(keys, endpoints).blocks.tolist()


@pytest.mark.parametrize(
    ("held", "asked", "length"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2, 9, 3], 2),
        ([2, 3], [1, 2, 3], 0),
        ([1, 3], [1, 2, 3], 1),
        ([1, 2, 3], [1], 1),
        ([1], [], 0),
        ([], [1], 0),
    ],
)
def test_a_match_is_the_contiguous_run_from_the_head(held: list[int], asked: list[int], length: int) -> None:
    assert blocks(index_of((1, "gpu", held)), asked, 3) == [0, length, 0]


def test_each_endpoint_has_its_own_run() -> None:
    index = index_of((0, "gpu", [1, 2, 3]), (5, "gpu", [1]), (9, "gpu", [2, 3]))
    assert blocks(index, [1, 2, 3], 10) == [3, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_any_number_of_endpoints_may_hold_a_block() -> None:
    index = index_of(*((e, "gpu", list(range(1, 2 + e))) for e in range(150)))
    assert blocks(index, list(range(1, 200)), 150) == [1.0 + e for e in range(150)]


def test_a_block_counts_with_the_best_tier_it_is_on_and_any_tier_continues_a_run() -> None:
    index = index_of(
        (0, "gpu", [1, 2, 4]), (0, "cpu", [2, 3]), (1, "cpu", [1, 2]), (2, "nothing", [1]), (3, "disk", [1])
    )
    runs = index.match([1, 2, 3, 4, 5], 4)
    assert runs.blocks.tolist() == [4, 2, 1, 1]
    assert runs.weighted.tolist() == pytest.approx([3.8, 1.6, 0.0, 1.0])


def test_runs_of_many_different_neighbours_are_whole() -> None:
    length = 3 * ROWS + 7
    keys = list(range(1, length + 1))
    index = index_of((0, "gpu", keys), (1, "gpu", keys[::2]), (1, "cpu", keys[1::2]), (2, "gpu", keys[: ROWS + 1]))
    index.remove(0, "gpu", [2 * ROWS + 1])
    runs = index.match(keys, 3)
    assert runs.blocks.tolist() == [2 * ROWS, length, ROWS + 1]
    assert runs.weighted[1] == pytest.approx(len(keys[::2]) + 0.8 * len(keys[1::2]))


def test_a_block_announced_twice_goes_with_its_second_removal() -> None:
    index = index_of((0, "gpu", [1, 2]), (0, "gpu", [1]))
    index.remove(0, "gpu", [1])
    assert blocks(index, [1, 2], 1) == [2]
    index.remove(0, "gpu", [1])
    assert blocks(index, [1, 2], 1) == [0]
    assert (index.suppressed, index.forwarded) == (1, 1)
    index.remove(0, "gpu", [1, 7])
    index.remove(0, "cpu", [2])
    index.remove(9, "gpu", [2])
    assert (len(index), index.holds(0, 2), index.holds(0, 1), index.holds(9, 2)) == (1, True, False, False)


def test_dropping_takes_a_block_from_every_tier_however_often_it_was_announced() -> None:
    index = index_of((0, "gpu", [1]), (0, "gpu", [1]), (0, "cpu", [1]), (1, "gpu", [1]))
    index.drop(0, [1, 5])
    assert blocks(index, [1], 2) == [0, 1]


def test_a_forgotten_endpoint_leaves_nothing_and_its_number_is_free() -> None:
    index = index_of((0, "gpu", [1, 2]), (0, "cpu", [3]), (1, "gpu", [1]))
    index.forget(0)
    index.forget(0)
    assert (len(index), blocks(index, [1, 2], 2)) == (1, [0, 1])
    index.add(0, "gpu", [1])
    assert blocks(index, [1, 2], 2) == [1, 1]


def test_a_full_index_drops_its_oldest_keys_for_everyone() -> None:
    index = index_of((0, "gpu", [1, 2, 3]), (1, "cpu", [1]), size=64)
    index.add(0, "gpu", list(range(100, 162)))
    assert len(index) <= 64
    assert not index.holds(0, 1)
    assert not index.holds(1, 1)
    assert index.holds(0, 161)
    index.add(0, "gpu", list(range(1000, 2000)))
    assert len(index) <= 64
    assert index.admissions - index.evictions == len(index)


def test_an_endpoint_has_a_bounded_number_of_tiers() -> None:
    index = BlockIndex(100, WEIGHTS)
    assert all(index.add(0, f"tier{i}", [i]) for i in range(MAX_TIERS))
    assert not index.add(0, "one more", [1])
    assert index.add(1, "one more", [1])


class IndexAgainstModel(RuleBasedStateMachine):
    """The index and a plain model of it: (endpoint, tier) -> how often each key was announced."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(10_000, WEIGHTS)
        self.model: dict[tuple[int, str], Counter[int]] = {}

    endpoint, tier = st.integers(0, 3), st.sampled_from(["gpu", "cpu", "disk"])
    keys = st.lists(st.integers(1, 8), max_size=6)

    @rule(endpoint=endpoint, tier=tier, keys=keys)
    def add(self, endpoint: int, tier: str, keys: list[int]) -> None:
        self.index.add(endpoint, tier, keys)
        self.model.setdefault((endpoint, tier), Counter()).update(keys)

    @rule(endpoint=endpoint, tier=tier, keys=keys)
    def remove(self, endpoint: int, tier: str, keys: list[int]) -> None:
        self.index.remove(endpoint, tier, keys)
        held = self.model.get((endpoint, tier), Counter())
        held -= Counter({key: min(keys.count(key), held[key]) for key in keys})
        if (endpoint, tier) in self.model:
            self.model[endpoint, tier] = held

    @rule(endpoint=endpoint)
    def forget(self, endpoint: int) -> None:
        self.index.forget(endpoint)
        for held in [h for h in self.model if h[0] == endpoint]:
            del self.model[held]

    @rule(keys=st.lists(st.integers(1, 9), max_size=9, unique=True))
    def match(self, keys: list[int]) -> None:
        runs = self.index.match(keys, 4)
        for e in range(4):
            length, weighted = 0, 0.0
            for key in keys:
                tiers = [t for (owner, t), held in self.model.items() if owner == e and held[key] > 0]
                if not tiers:
                    break
                length, weighted = length + 1, weighted + max(WEIGHTS.get(t, 1.0) for t in tiers)
            assert runs.blocks[e] == length
            assert runs.weighted[e] == pytest.approx(weighted)

    @invariant()
    def holds_nothing_else(self) -> None:
        held = {key for counter in self.model.values() for key, count in counter.items() if count > 0}
        assert len(self.index) == len(held)
        placed = sum(count > 0 for counter in self.model.values() for count in counter.values())
        assert self.index.admissions - self.index.evictions == placed


IndexAgainstModel.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
test_the_index_behaves_like_its_model = IndexAgainstModel.TestCase
