"""The approximate prefix index: contiguous matches, bounded, tails go first, replies are learnt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llmd_sched.parsers.anthropic import AnthropicParser
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.plugin import Parser
from llmd_sched.prefix import approx, approx_index, hashing
from llmd_sched.prefix.approx import MIN_BLOCK_TOKENS, ApproxPrefixCache, ApproxPrefixCacheProducer
from llmd_sched.prefix.approx_index import Chains, Crowd, HeldBlocks, chains
from llmd_sched.types import Candidates, End, Endpoint, Outcome, Request
from tests.builders import PREFIX, asking, candidates, decision, endpoint, endpoints, prompt, request


def of(*prompts: Sequence[int]) -> Chains:
    return chains([np.array(one, np.uint64) for one in prompts])


def holding(capacity: int, *prompts: Sequence[int]) -> HeldBlocks:
    """An endpoint that got these prompts, one after another."""
    held = HeldBlocks()
    for one in prompts:
        held.insert(of(one), capacity)
    return held


@pytest.mark.parametrize(
    ("held", "asked", "length"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2, 9, 10], 2),
        ([2, 3], [1, 2, 3], 0),  # without its head a prefix is worth nothing
        ([1, 2, 3], [1], 1),
        ([1, 2, 3], [1, 2, 3, 4, 5, 6, 7], 3),
        ([0], [0], 1),  # a hash like any other
        ([1], [0], 0),
        ([1], [], 0),
        ([], [1], 0),
    ],
)
def test_a_match_is_the_contiguous_run_from_the_head(held: list[int], asked: list[int], length: int) -> None:
    assert holding(100, held).match(of(asked)) == length


def test_runs_of_several_prompts_are_added_up() -> None:
    held = HeldBlocks()
    held.insert(of([1, 2], [], [7]), 9)
    assert held.match(of([1, 2, 3], [7], [8], [])) == 3
    assert held.match(of()) == 0


def test_a_full_endpoint_loses_the_tail_of_its_oldest_prompt_first() -> None:
    held = holding(5, [1, 2, 3], [7, 8, 9])
    assert [held.match(of(one)) for one in ([1, 2, 3], [7, 8, 9])] == [2, 3]


def test_a_prompt_longer_than_the_cache_keeps_its_head() -> None:
    held = holding(2, [1, 2, 3, 4])
    assert (held.match(of([1, 2, 3, 4])), len(held)) == (2, 2)


def test_a_hit_refreshes_what_it_hit() -> None:
    held = holding(4, [1, 2], [7, 8], [1, 2], [5, 6])
    assert [held.match(of(one)) for one in ([1, 2], [7, 8])] == [2, 0]


def test_a_lookup_alone_refreshes_nothing() -> None:
    held = holding(4, [1, 2], [7, 8])
    held.match(of([1, 2]))
    held.insert(of([5, 6]), 4)
    assert held.match(of([1, 2])) == 0


def test_a_shared_head_survives_longest() -> None:
    held = holding(6, *([1, 2, tail] for tail in range(100, 120)))
    assert [held.match(of([1, 2, tail])) for tail in (119, 100)] == [3, 2]


def test_a_cache_that_got_smaller_loses_its_oldest_and_one_that_grew_loses_nothing() -> None:
    held = holding(6, [1, 2, 3], [7, 8, 9])
    held.insert(of([5]), 4)
    assert (len(held), [held.match(of(one)) for one in ([1, 2, 3], [7, 8, 9])]) == (4, [0, 3])
    held.insert(of([6]), 9)
    assert (len(held), held.match(of([7, 8, 9]))) == (5, 3)


def test_memory_follows_what_is_held_and_not_what_might_be() -> None:
    held = holding(1_000_000, list(range(100)))
    assert sum(getattr(held, name).nbytes for name in ("_slots", "_hashes", "_older", "_newer")) <= 48 * 100


class HeldAgainstModel(RuleBasedStateMachine):
    """What is held and a plain model of it: an ordered dict, oldest first.

    A prompt is a path through a binary tree, so many share their heads, as prompts do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = HeldBlocks()
        self.model: OrderedDict[int, None] = OrderedDict()
        self.capacity = 0
        self.shift = 0

    @initialize(shift=st.sampled_from([0, 40, 54]))
    def hash_well_or_badly(self, shift: int) -> None:
        self.shift = shift  # shifted far, all land in the same slot

    def chain(self, path: list[bool]) -> list[int]:
        node, hashes = 1, []
        for right in path:
            node = 2 * node + right
            hashes.append((node << self.shift) % (1 << 64))
        return hashes

    @rule(paths=st.lists(st.lists(st.booleans(), max_size=7), max_size=3), capacity=st.integers(1, 40))
    def insert(self, paths: list[list[bool]], capacity: int) -> None:
        self.held.insert(of(*map(self.chain, paths)), capacity)
        self.capacity = capacity
        for path in paths:
            for h in reversed(self.chain(path)[:capacity]):
                self.model[h] = None
                self.model.move_to_end(h)
        while len(self.model) > capacity:
            self.model.popitem(last=False)

    @rule(paths=st.lists(st.lists(st.booleans(), max_size=9), max_size=3))
    def match(self, paths: list[list[bool]]) -> None:
        asked = [*map(self.chain, paths)]
        runs = [next((i for i, h in enumerate(hashes) if h not in self.model), len(hashes)) for hashes in asked]
        assert self.held.match(of(*asked)) == sum(runs)

    @invariant()
    def as_much_is_held(self) -> None:
        assert len(self.held) == len(self.model) <= self.capacity


HeldAgainstModel.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
test_what_is_held_behaves_like_its_model = HeldAgainstModel.TestCase


def test_a_large_cache_agrees_with_its_model_while_it_grows_and_then_evicts() -> None:
    random, held, model = Random(1), HeldBlocks(), OrderedDict[int, None]()
    trunks = [[random.getrandbits(64) for _ in range(60)] for _ in range(12)]
    prompts = []
    for _ in range(400):
        trunk = random.choice(trunks)
        prompts.append(trunk[: random.randint(0, 60)] + [random.getrandbits(64) for _ in range(random.randint(1, 30))])
        held.insert(of(prompts[-1]), 1500)
        for h in reversed(prompts[-1]):
            model[h] = None
            model.move_to_end(h)
        while len(model) > 1500:
            model.popitem(last=False)
    assert len(held) == 1500
    for one in prompts:
        assert held.match(of(one)) == next((i for i, h in enumerate(one) if h not in model), len(one))


def opened(members: list[Endpoint], **parameters: object) -> ApproxPrefixCache:
    live = ApproxPrefixCacheProducer(**parameters).open(PREFIX)
    live.endpoints_changed(members)
    return live


def blocks_held(live: ApproxPrefixCache) -> int:
    return sum(map(len, live.held.values()))


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
    assert blocks_held(live) == 0


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
    assert blocks_held(live) == held


def test_a_removed_endpoint_gives_back_its_blocks_and_a_new_one_starts_empty() -> None:
    members = endpoints(3)
    live, view = opened(members), candidates(3)
    for position in range(3):
        send(live, asking(prompt(2)), view, position)
    live.endpoints_changed([members[0], members[2]])
    assert blocks_held(live) == 4
    newcomer = endpoint(7)
    live.endpoints_changed([members[0], members[2], newcomer])
    view = Candidates([members[0], members[2], newcomer], candidates(3).columns)
    assert produced(live, asking(prompt(2)), view)["prefix_match_blocks"] == [2.0, 2.0, 0.0]


def test_only_members_hold_anything_while_endpoints_come_and_go() -> None:
    live = opened([])
    everyone = endpoints(6)
    for round_ in range(60):
        members = [e for i, e in enumerate(everyone) if (round_ * 7 + i * i) % 5 > 1]
        live.endpoints_changed(members)
        for position, _ in enumerate(members):
            view = Candidates(members, candidates(len(members)).columns)
            send(live, asking(prompt(1, seed=round_ + position)), view, position)
        assert set(live.held) == {e.server for e in members}
    live.endpoints_changed([])
    assert blocks_held(live) == 0


def test_a_subset_of_the_pool_is_matched_in_its_own_order() -> None:
    members = endpoints(4)
    live, view = opened(members), candidates(4)
    send(live, asking(prompt(3)), view, 2)
    some = Candidates([members[3], members[2]], candidates(2).columns)
    assert produced(live, asking(prompt(3)), some)["prefix_match_blocks"] == [0.0, 3.0]
    send(live, asking(prompt(3)), some, 0)
    assert produced(live, asking(prompt(3)), view)["prefix_match_blocks"] == [0.0, 0.0, 3.0, 3.0]


def test_a_request_looked_up_again_sees_what_has_come_since() -> None:
    live, view = opened(endpoints(2)), candidates(2)
    waiting = asking(prompt(3))
    assert produced(live, waiting, view)["prefix_match_blocks"] == [0.0, 0.0]
    send(live, asking(prompt(3)), view, 1)
    assert produced(live, waiting, view)["prefix_match_blocks"] == [0.0, 3.0]
    assert produced(live, waiting, candidates(block_tokens=[128, 128]))["prefix_total_blocks"] == [2.0, 2.0]


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


# ------------------------------------------------------------------------------------------------------------ replies


def turn(parser: Parser, path: str, *said: str) -> Request:
    """A chat of alternating user and assistant messages."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    body = json.dumps({"model": "m", "max_tokens": 9, "messages": messages}).encode()
    return asking(parser.parse(path, body).prompts[0])


def open_turn(live: ApproxPrefixCache, asked: Request, view: Candidates, position: int = 0, ticket: str = "t") -> None:
    live.produce(asked, view, 0.0)
    live.chosen(decision(ticket, asked, view.endpoints[position]), view, position, 0.0)


@pytest.mark.parametrize(
    ("parser", "path"), [(OpenAIParser(), "/v1/chat/completions"), (AnthropicParser(), "/v1/messages")]
)
@pytest.mark.parametrize("first", [5, 251, 252, 253, 256, 3000])
@pytest.mark.parametrize("reply", [0, 1, 250, 256, 1000])
def test_the_next_turn_of_a_chat_finds_the_reply_too(parser: Parser, path: str, first: int, reply: int) -> None:
    live, view = opened(endpoints(2)), candidates(2)
    question, answer = "q" * first, "a" * reply
    asked = turn(parser, path, question)
    open_turn(live, asked, view, 1)
    live.learn_reply("t", b"assistant" + answer.encode())
    following = turn(parser, path, question, answer, "And then? " * 60)
    assert following.prompts[0].startswith(asked.prompts[0] + b"assistant" + answer.encode())
    full = (len(asked.prompts[0]) + 9 + reply) // 256
    assert produced(live, following, view)["prefix_match_blocks"] == [0.0, full]


def test_without_the_reply_the_next_turn_finds_the_prompt_alone() -> None:
    live, view = opened(endpoints(1)), candidates(1)
    open_turn(live, asking(prompt(2)), view)
    assert produced(live, asking(prompt(2) + prompt(3, 1)), view)["prefix_match_blocks"] == [2.0]


def test_a_reply_is_held_by_the_endpoint_that_gave_it_under_its_model_and_salt() -> None:
    live, view = opened(endpoints(2)), candidates(2)
    open_turn(live, asking(prompt(1), cache_salt="s"), view, 0, "a")
    open_turn(live, asking(prompt(1)), view, 1, "b")
    live.learn_reply("a", prompt(1, 1))
    live.learn_reply("b", prompt(1, 2))
    for seed, salt, match in [(1, "s", [2.0, 0.0]), (1, "", [0.0, 1.0]), (2, "", [0.0, 2.0]), (2, "s", [1.0, 0.0])]:
        asked = asking(prompt(1) + prompt(1, seed), cache_salt=salt)
        assert produced(live, asked, view)["prefix_match_blocks"] == match


def test_a_reply_is_learnt_within_the_cap_and_the_capacity() -> None:
    live = opened(endpoints(1), max_prefix_tokens_to_match=192, lru_capacity_per_server=16)
    open_turn(live, asking(prompt(1)), candidates(1))
    live.learn_reply("t", prompt(9, 1))
    assert blocks_held(live) == 3
    open_turn(live, asking(prompt(3, 2)), candidates(1), ticket="long")
    live.learn_reply("long", prompt(9, 1))
    assert blocks_held(live) == 4
    assert produced(live, asking(prompt(3, 2)), candidates(1))["prefix_match_blocks"] == [3.0]


def test_a_reply_refreshes_its_prompt() -> None:
    live, view = opened(endpoints(1), lru_capacity_per_server=16), candidates(1)
    open_turn(live, asking(prompt(2)), view)
    open_turn(live, asking(prompt(2, 1)), view, ticket="other")
    live.learn_reply("t", prompt(1, 2))
    assert produced(live, asking(prompt(2) + prompt(1, 2)), view)["prefix_match_blocks"] == [3.0]
    assert produced(live, asking(prompt(2, 1)), view)["prefix_match_blocks"] == [1.0]


@pytest.mark.parametrize("asked", [request(prompts=(prompt(1), prompt(1, 1))), request()])
def test_a_reply_to_several_prompts_or_none_is_not_learnt(asked: Request) -> None:
    live, view = opened(endpoints(1)), candidates(1)
    open_turn(live, asked, view)
    before = blocks_held(live)
    live.learn_reply("t", prompt(3, 2))
    assert blocks_held(live) == before


def test_a_reply_after_the_end_or_of_an_unknown_or_a_learnt_request_teaches_nothing() -> None:
    live, view = opened(endpoints(1)), candidates(1)
    open_turn(live, asking(prompt(1)), view)
    live.learn_reply("t", b"")
    live.learn_reply("t", prompt(1, 1))
    open_turn(live, asking(prompt(1)), view, ticket="over")
    live.finished("over", Outcome(end=End.FINISHED), 0.0)
    live.learn_reply("over", prompt(1, 1))
    live.learn_reply("never", prompt(1, 1))
    assert blocks_held(live) == 1


def test_a_reply_of_an_endpoint_that_left_is_nobodys() -> None:
    members = endpoints(2)
    live = opened(members)
    open_turn(live, asking(prompt(1)), candidates(2))
    live.endpoints_changed([members[1], endpoint(7)])
    live.learn_reply("t", prompt(1, 1))
    assert blocks_held(live) == 0


def test_few_open_requests_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approx, "MAX_OPEN", 2)
    live, view = opened(endpoints(1)), candidates(1)
    for ticket in "abc":
        open_turn(live, asking(prompt(1)), view, ticket=ticket)
    live.learn_reply("a", prompt(1, 1))
    assert blocks_held(live) == 1
    live.learn_reply("b", prompt(1, 1))
    assert blocks_held(live) == 2


def test_two_producers_side_by_side_learn_apart() -> None:
    view = candidates(1)
    coarse = opened(endpoints(1), auto_tune=False, block_size_tokens=128)
    fine = opened(endpoints(1))
    for live in (coarse, fine):
        open_turn(live, asking(prompt(3)), view)
        live.learn_reply("t", prompt(2, 1))
    following = asking(prompt(3) + prompt(2, 1))
    assert [produced(live, following, view)["prefix_match_blocks"] for live in (coarse, fine)] == [[2.0], [5.0]]


def test_a_warm_up_compiles_all_that_requests_need() -> None:
    """In a process of its own: here other tests have called the kernels, some in other ways."""
    root = Path(__file__).parents[2]
    alone = "from tests.unit.test_approx import warm_up_and_then_ask; warm_up_and_then_ask()"
    done = subprocess.run([sys.executable, "-c", alone], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def warm_up_and_then_ask() -> None:
    approx.warm_up()
    live, view = opened(endpoints(1)), candidates(1)
    open_turn(live, request(prompts=(prompt(1), prompt(40), b"")), view)
    open_turn(live, asking(prompt(70, 1)), view)
    live.learn_reply("t", prompt(2))
    kernels = [k for module in (approx_index, hashing) for k in vars(module).values() if hasattr(k, "signatures")]
    assert len(kernels) > 5
    assert {str(k): len(k.signatures) for k in kernels if len(k.signatures) > 1} == {}


def test_a_crowd_says_of_each_member_what_it_says_itself_whatever_happens_to_its_tables() -> None:
    members = [HeldBlocks() for _ in range(5)]
    crowd, rng = Crowd(members), np.random.default_rng(4)
    asked = [chains([rng.integers(0, 2**63, 40).astype(np.uint64)]) for _ in range(6)]
    for turn in range(200):
        member, chain = members[turn % 5], asked[int(rng.integers(6))]
        member.insert(chain, 50 + 40 * (turn // 50))
        for one in asked:
            assert crowd.match(one).tolist() == [float(m.match(one)) for m in members]
    assert Crowd([]).match(asked[0]).tolist() == []
