"""The approximate prefix index: contiguous matches, bounded, tails go first."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmd_sched.prefix.approx import MIN_BLOCK_TOKENS, ApproxPrefixCache, ApproxPrefixCacheProducer, PrefixIndex
from llmd_sched.types import Candidates, Endpoint, Request
from tests.builders import PREFIX, asking, candidates, decision, endpoint, endpoints, prompt, request


def match(index: PrefixIndex, hashes: list[int], endpoints: list[int]) -> list[int]:
    """Leading blocks each endpoint holds."""
    found = index.match(hashes, sum(1 << e for e in endpoints))
    assert all(found.values())
    return [found.get(e, 0) for e in endpoints]


@pytest.mark.parametrize(
    ("held", "asked", "length"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2, 9, 3], 2),
        ([2, 3], [1, 2, 3], 0),  # without its head a prefix is worth nothing
        ([1, 3], [1, 2, 3], 1),
        ([1, 2, 3], [1], 1),
        ([1], [], 0),
        ([], [1], 0),
    ],
)
def test_a_match_is_the_contiguous_run_from_the_head(held: list[int], asked: list[int], length: int) -> None:
    index = PrefixIndex()
    index.insert(held, 0, 100)
    assert match(index, asked, [0]) == [length]


def test_each_endpoint_has_its_own_run() -> None:
    index = PrefixIndex()
    index.insert([1, 2, 3], 0, 9)
    index.insert([1], 5, 9)
    index.insert([2, 3], 70, 9)
    assert match(index, [1, 2, 3], [5, 70, 0, 6]) == [1, 0, 3, 0]
    assert match(index, [1, 2, 3], []) == []


def test_a_full_endpoint_loses_the_tail_of_its_oldest_prompt_first() -> None:
    index = PrefixIndex()
    index.insert([1, 2, 3], 0, 5)
    index.insert([7, 8, 9], 0, 5)
    assert match(index, [1, 2, 3], [0]) == [2]
    assert match(index, [7, 8, 9], [0]) == [3]


def test_a_prompt_longer_than_the_cache_keeps_its_head() -> None:
    index = PrefixIndex()
    index.insert([1, 2, 3, 4], 0, 2)
    assert match(index, [1, 2, 3, 4], [0]) == [2]
    assert index.size(0) == 2


def test_a_hit_refreshes_what_it_hit() -> None:
    index = PrefixIndex()
    index.insert([1, 2], 0, 4)
    index.insert([7, 8], 0, 4)
    index.insert([1, 2], 0, 4)
    index.insert([5, 6], 0, 4)
    assert match(index, [1, 2], [0]) == [2]
    assert match(index, [7, 8], [0]) == [0]


def test_a_lookup_alone_refreshes_nothing() -> None:
    index = PrefixIndex()
    index.insert([1, 2], 0, 4)
    index.insert([7, 8], 0, 4)
    match(index, [1, 2], [0])
    index.insert([5, 6], 0, 4)
    assert match(index, [1, 2], [0]) == [0]


def test_a_shared_head_survives_longest() -> None:
    index = PrefixIndex()
    for tail in range(100, 120):
        index.insert([1, 2, tail], 0, 6)
    assert match(index, [1, 2, 119], [0]) == [3]
    assert match(index, [1, 2, 100], [0]) == [2]


def test_forgetting_an_endpoint_leaves_the_others_alone() -> None:
    index = PrefixIndex()
    index.insert([1, 2], 0, 9)
    index.insert([1], 1, 9)
    index.forget(0)
    index.forget(0)
    assert match(index, [1, 2], [0, 1]) == [0, 1]
    assert (len(index), index.size(0)) == (1, 0)


class IndexAgainstModel(RuleBasedStateMachine):
    """The index and a plain model of it: per endpoint an ordered dict, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.model: dict[int, OrderedDict[int, None]] = {}
        self.capacity = {e: 3 + e for e in range(4)}

    @staticmethod
    def chain(family: int, length: int) -> list[int]:
        """Chains of one family share their heads, as prompts do."""
        return [100 * family + i for i in range(length)]

    @rule(endpoint=st.integers(0, 3), family=st.integers(0, 3), length=st.integers(0, 7))
    def insert(self, endpoint: int, family: int, length: int) -> None:
        hashes = self.chain(family, length)
        self.index.insert(hashes, endpoint, self.capacity[endpoint])
        held = self.model.setdefault(endpoint, OrderedDict())
        for h in reversed(hashes[: self.capacity[endpoint]]):
            held[h] = None
            held.move_to_end(h)
        while len(held) > self.capacity[endpoint]:
            held.popitem(last=False)

    @rule(endpoint=st.integers(0, 3))
    def forget(self, endpoint: int) -> None:
        self.index.forget(endpoint)
        self.model.pop(endpoint, None)

    @rule(family=st.integers(0, 3), length=st.integers(0, 8))
    def match(self, family: int, length: int) -> None:
        hashes = self.chain(family, length)
        expected = []
        for e in range(4):
            held = self.model.get(e, {})
            expected.append(next((i for i, h in enumerate(hashes) if h not in held), len(hashes)))
        assert match(self.index, hashes, [0, 1, 2, 3]) == expected

    @invariant()
    def is_bounded_and_holds_nothing_else(self) -> None:
        for e, capacity in self.capacity.items():
            assert self.index.size(e) == len(self.model.get(e, ())) <= capacity
        assert len(self.index) == len(set().union(*self.model.values())) if self.model else len(self.index) == 0


IndexAgainstModel.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
test_the_index_behaves_like_its_model = IndexAgainstModel.TestCase


def opened(members: list[Endpoint], **parameters: object) -> ApproxPrefixCache:
    live = ApproxPrefixCacheProducer(**parameters).open(PREFIX)
    live.endpoints_changed(members)
    return live


def produced(live: ApproxPrefixCache, asked: Request, view: Candidates) -> dict[str, list[float]]:
    return {name.partition("/")[0]: values.tolist() for name, values in live.produce(asked, view, 0.0).items()}


def send(live: ApproxPrefixCache, asked: Request, view: Candidates, position: int) -> None:
    live.produce(asked, view, 0.0)
    live.chosen(decision("t", asked, view.endpoints[position]), view, position, 0.0)


def test_columns_say_what_each_endpoint_holds_of_the_prompt() -> None:
    live, view = opened(endpoints(3)), candidates(3)
    send(live, asking(prompt(4)), view, 1)
    columns = produced(live, asking(prompt(4) + prompt(2, seed=1)), view)
    assert columns == {
        "prefix_match_blocks": [0.0, 4.0, 0.0],
        "prefix_total_blocks": [6.0, 6.0, 6.0],
        "prefix_block_tokens": [64.0, 64.0, 64.0],
    }


def test_a_choice_for_another_request_than_the_one_looked_up_holds_nothing() -> None:
    live, view = opened(endpoints(1)), candidates(1)
    live.produce(asking(prompt(4)), view, 0.0)
    other = asking(prompt(4))
    live.chosen(decision("t", other, view.endpoints[0]), view, 0, 0.0)
    assert len(live.index) == 0


def test_what_was_only_looked_up_is_not_held() -> None:
    live, view = opened(endpoints(1)), candidates(1)
    live.produce(asking(prompt(4)), view, 0.0)
    assert produced(live, asking(prompt(4)), view)["prefix_match_blocks"] == [0.0]


@pytest.mark.parametrize("asked", [request(), request(prompts=(b"",)), request(prompts=())])
def test_a_request_without_a_prompt_has_no_blocks(asked: Request) -> None:
    live, view = opened(endpoints(2)), candidates(2)
    send(live, asked, view, 0)
    assert produced(live, asked, view)["prefix_total_blocks"] == [0.0, 0.0]


def test_several_prompts_are_counted_together() -> None:
    live, view = opened(endpoints(1)), candidates(1)
    asked = request(prompts=(prompt(2), prompt(3, seed=1)))
    send(live, asked, view, 0)
    columns = produced(live, asked, view)
    assert (columns["prefix_match_blocks"], columns["prefix_total_blocks"]) == ([5.0], [5.0])


@pytest.mark.parametrize(("model", "salt", "match"), [("m", "", 2.0), ("n", "", 0.0), ("m", "salt", 0.0)])
def test_another_model_or_salt_shares_nothing(model: str, salt: str, match: float) -> None:
    live, view = opened(endpoints(1)), candidates(1)
    send(live, asking(prompt(2)), view, 0)
    asked = asking(prompt(2), target_model=model, cache_salt=salt)
    assert produced(live, asked, view)["prefix_match_blocks"] == [match]


@pytest.mark.parametrize(
    ("parameters", "reported", "block_tokens"),
    [
        ({}, [16, 16], 64),  # never under the floor
        ({}, [128, 128], 128),
        ({}, [0, 128], 128),
        ({}, [0, 0], 64),
        ({"block_size_tokens": 256}, [0, 0], 256),
        ({"block_size_tokens": 256}, [128, 128], 128),
        ({"auto_tune": False, "block_size_tokens": 256}, [128, 128], 256),
        ({"auto_tune": False, "block_size_tokens": 8}, [128, 128], MIN_BLOCK_TOKENS),
        ({"auto_tune": False, "block_size": 96}, [0, 0], 96),
        ({"auto_tune": False, "block_size": 96, "block_size_tokens": 80}, [0, 0], 80),
    ],
)
def test_the_block_size_is_the_engines_or_the_configured_one(
    parameters: dict[str, object], reported: list[float], block_tokens: int
) -> None:
    live = opened(endpoints(2), **parameters)
    columns = produced(live, asking(prompt(4)), candidates(block_tokens=reported))
    assert columns["prefix_block_tokens"] == [block_tokens] * 2


@pytest.mark.parametrize(
    ("parameters", "blocks"),
    [
        ({"max_prefix_tokens_to_match": 128}, 2),
        ({"max_prefix_tokens_to_match": 130}, 2),
        ({"max_prefix_tokens_to_match": 63}, 0),
        ({"max_prefix_tokens_to_match": 0, "max_prefix_blocks_to_match": 3}, 3),
        ({"max_prefix_tokens_to_match": 128, "max_prefix_blocks_to_match": 1}, 2),
        ({"max_prefix_tokens_to_match": 0, "max_prefix_blocks_to_match": 0}, 5),
    ],
)
def test_a_prompt_is_compared_up_to_the_cap(parameters: dict[str, object], blocks: int) -> None:
    live = opened(endpoints(1), **parameters)
    assert produced(live, asking(prompt(5)), candidates(1))["prefix_total_blocks"] == [blocks]


@pytest.mark.parametrize(
    ("parameters", "cache_blocks", "block_tokens", "held"),
    [
        ({}, 16, 16, 4),  # 256 tokens are four of our blocks
        ({}, 4, 128, 4),  # an engine's block of 128 is ours
        ({}, 1, 16, 1),  # at least one
        ({"lru_capacity_per_server": 12}, 0, 0, 3),
        ({"lru_capacity_per_server": 12}, 0, 16, 3),
        ({"auto_tune": False, "lru_capacity_per_server": 12}, 16, 16, 3),
    ],
)
def test_an_engines_blocks_are_converted_to_ours(
    parameters: dict[str, object], cache_blocks: int, block_tokens: int, held: int
) -> None:
    live = opened(endpoints(1), **parameters)
    view = candidates(cache_blocks=[cache_blocks], block_tokens=[block_tokens])
    asked = asking(prompt(20))
    send(live, asked, view, 0)
    assert produced(live, asked, view)["prefix_match_blocks"] == [held]
    assert live.index.size(0) == held


def test_a_removed_endpoint_gives_back_its_blocks_and_its_number() -> None:
    members = endpoints(3)
    live, view = opened(members), candidates(3)
    for position in range(3):
        send(live, asking(prompt(2)), view, position)
    live.endpoints_changed([members[0], members[2]])
    assert live.index.size(1) == 0
    newcomer = endpoint(7)
    live.endpoints_changed([members[0], members[2], newcomer])
    view = Candidates([members[0], members[2], newcomer], candidates(3).columns)
    assert produced(live, asking(prompt(2)), view)["prefix_match_blocks"] == [2.0, 2.0, 0.0]


def test_numbers_stay_few_and_unique_while_endpoints_come_and_go() -> None:
    live = opened([])
    everyone = endpoints(6)
    for round_ in range(60):
        members = [e for i, e in enumerate(everyone) if (round_ * 7 + i * i) % 5 > 1]
        live.endpoints_changed(members)
        for position, one in enumerate(members):
            view = Candidates(members, candidates(len(members)).columns)
            send(live, asking(prompt(1, seed=hash(one.name) % 99)), view, position)
        assert all(live.index.size(number) == 0 for number in range(6, 30))
    live.endpoints_changed([])
    assert len(live.index) == 0


def test_an_endpoint_that_moved_to_another_address_starts_empty() -> None:
    members = endpoints(2)
    live, view = opened(members), candidates(2)
    send(live, asking(prompt(2)), view, 0)
    moved = [endpoint(0, address="10.9.9.9"), members[1]]
    live.endpoints_changed(moved)
    columns = produced(live, asking(prompt(2)), Candidates(moved, view.columns))
    assert columns["prefix_match_blocks"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_prefix_tokens_to_match": -1}, "maxPrefixTokensToMatch"),
        ({"max_prefix_blocks_to_match": -1}, "maxPrefixBlocksToMatch"),
        ({"auto_tune": False, "block_size_tokens": 0}, "must be positive when autoTune is false"),
        ({"auto_tune": False, "block_size": -1}, "must be positive when autoTune is false"),
        ({"lru_capacity_per_server": 0}, "lruCapacityPerServer"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ApproxPrefixCacheProducer(**parameters).check()
    ApproxPrefixCacheProducer(block_size_tokens=0).check()
