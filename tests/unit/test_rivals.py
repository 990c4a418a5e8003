"""The rules of other routers, on numbers small enough to check by hand."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest

from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Producer
from llmd_sched.router import Router
from llmd_sched.sched.rivals import (
    DynamoCost,
    DynamoCostScorer,
    PowerOfTwoPicker,
    RoundRobin,
    RoundRobinScorer,
    SglangCacheAware,
    SglangCacheAwareScorer,
    prompt_chain,
)
from llmd_sched.types import Candidates, Request
from tests.builders import (
    asking,
    candidates,
    decision,
    endpoint,
    endpoints,
    pool_of,
    prompt,
    request,
    router_of,
    streamed,
)


def send(live: Producer, asked: Request, view: Candidates, position: int, ticket: str = "t") -> None:
    """One request through all hooks up to its dispatch."""
    live.produce(asked, view, 0.0)
    live.chosen(decision(ticket, asked, view.endpoints[position]), view, position, 0.0)


def round_robin(picked: int | None = None) -> RoundRobin:
    live = RoundRobinScorer().open("mine")
    if picked is not None:
        send(live, request(), candidates(9), picked)
    return live


@pytest.mark.parametrize(
    ("picked", "count", "scores"),
    [
        (None, 1, [1.0]),
        (None, 4, [1.0, 0.75, 0.5, 0.25]),
        (1, 4, [0.5, 0.25, 1.0, 0.75]),
        (3, 4, [1.0, 0.75, 0.5, 0.25]),
        (8, 4, [1.0, 0.75, 0.5, 0.25]),  # one that is no candidate
    ],
)
def test_turns_follow_the_endpoint_that_was_picked_last(picked: int | None, count: int, scores: list[float]) -> None:
    assert round_robin(picked).score(request(), candidates(count)).tolist() == scores


def test_a_turn_passes_only_when_somebody_was_picked() -> None:
    live, view = round_robin(0), candidates(3)
    for _ in range(3):
        assert live.score(request(), view).argmax() == 1


def test_taking_turns_gives_everybody_the_same_number_of_requests() -> None:
    pool = pool_of(endpoints(3))
    router = router_of("plugins: [{type: round-robin-scorer}, {type: max-score-picker}]", pool)
    assert picks(router, 7) == ["e0", "e1", "e2", "e0", "e1", "e2", "e0"]
    pool.apply(endpoints(2))
    assert picks(router, 3) == ["e1", "e0", "e1"]


def picks(router: Router, count: int) -> list[str]:
    return [router.choose(asking(prompt(1)), None, 0.0).picked[0].name for _ in range(count)]


def test_the_better_of_two_comes_first_and_the_worst_only_when_alone() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.3])
    firsts = Counter(int(PowerOfTwoPicker().order(scores, Random(seed))[0]) for seed in range(600))
    # Of the six pairs the best wins three, the second two, the third one, the worst none.
    assert [round(firsts[i] / 100) for i in (1, 2, 3, 0)] == [3, 2, 1, 0]
    assert PowerOfTwoPicker().order(scores[:1], Random(0)).tolist() == [0]


@pytest.mark.parametrize("size", [1, 2, 7, 200])
def test_the_better_of_two_orders_everybody_whatever_the_scores(size: int) -> None:
    for scores in (np.zeros(size), np.linspace(-1, 3, size), np.full(size, 1e300)):
        before = scores.copy()
        order = PowerOfTwoPicker().order(scores, Random(4))
        assert sorted(order.tolist()) == list(range(size))
        assert np.array_equal(order, PowerOfTwoPicker().order(scores, Random(4)))
        assert np.array_equal(before, scores)


def test_equal_ones_are_taken_at_random() -> None:
    firsts = Counter(int(PowerOfTwoPicker().order(np.ones(3), Random(seed))[0]) for seed in range(300))
    assert min(firsts.values()) > 70


def dynamo(**parameters: object) -> DynamoCost:
    plugin = DynamoCostScorer(**parameters)
    plugin.check()
    live = plugin.open("mine")
    live.endpoints_changed(endpoints(4))
    return live


def scored(live: DynamoCost, asked: Request, view: Candidates) -> list[float]:
    return live.score(asked, view.with_columns(live.produce(asked, view, 0.0))).tolist()


def blocks(live: DynamoCost, asked: Request, count: int = 2) -> list[float]:
    return live.produce(asked, candidates(count), 0.0)["decode_blocks/mine"].tolist()


def test_blocks_in_use_are_those_of_open_requests_and_shared_ones_count_once() -> None:
    live, shared = dynamo(), prompt(4)
    first, second = asking(shared + prompt(2, seed=1)), asking(shared + prompt(3, seed=2))
    assert blocks(live, first) == [6.0, 6.0]
    send(live, first, candidates(2), 0, "a")
    assert blocks(live, first) == [6.0, 6.0]
    assert blocks(live, second) == [9.0, 7.0]
    send(live, second, candidates(2), 0, "b")
    assert blocks(live, asking(prompt(1, seed=3))) == [10.0, 1.0]
    live.finished("a", streamed(), 1.0)
    assert blocks(live, asking(prompt(1, seed=3))) == [8.0, 1.0]
    live.finished("b", streamed(), 1.0)
    live.finished("b", streamed(), 1.0)
    assert blocks(live, asking(prompt(1, seed=3))) == [1.0, 1.0]


def test_the_end_of_a_request_at_an_endpoint_that_is_gone_changes_nobody() -> None:
    live = dynamo()
    send(live, asking(prompt(5)), candidates(2), 0, "a")
    live.endpoints_changed([endpoint(1)])
    live.endpoints_changed(endpoints(2))
    assert blocks(live, asking(prompt(2))) == [2.0, 2.0]
    live.finished("a", streamed(), 1.0)
    assert blocks(live, asking(prompt(2))) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("parameters", "columns", "costs"),
    [
        ({}, {"match": [0, 4, 8]}, [8, 4, 0]),
        ({"prefill_load_scale": 0.5}, {"match": [0, 4, 8]}, [4, 2, 0]),
        ({"overlap_credit": 0.0}, {"match": [0, 4, 8]}, [8, 8, 8]),
        ({}, {"match": [0, 4, 8], "inflight_prefill_tokens": [0, 64, 640]}, [8, 5, 10]),
        ({}, {"match": [9, 9, 9]}, [0, 0, 0]),  # the index counts a part of a block as one
    ],
)
def test_the_cost_is_what_must_be_computed_there(
    parameters: dict[str, float], columns: dict[str, list[float]], costs: list[float]
) -> None:
    view = candidates(total=[8] * 3, block=[64] * 3, **columns)
    expected = [(max(costs) - c) / (max(costs) - min(costs)) if len(set(costs)) > 1 else 1.0 for c in costs]
    assert scored(dynamo(**parameters), asking(prompt(8)), view) == pytest.approx(expected)


def test_a_match_gives_way_to_blocks_in_use() -> None:
    live = dynamo()
    asked, view = asking(prompt(8)), candidates(match=[8, 0], total=[8, 8], block=[64, 64])
    assert scored(live, asked, view) == [1.0, 0.0]
    send(live, asking(prompt(9, seed=5)), view, 0)
    assert scored(live, asked, view) == [0.0, 1.0]


def test_chains_are_equal_as_far_as_prompts_are() -> None:
    one, other = (prompt_chain(asking(prompt(3) + prompt(2, seed=s)), 64) for s in (1, 2))
    assert one[:3] == other[:3]
    assert not set(one[3:]) & set(other[3:])
    assert len(set(one)) == 5
    assert prompt_chain(asking(prompt(3)[:-1]), 64) == one[:2]
    assert not set(one) & set(prompt_chain(asking(prompt(3), cache_salt="s"), 64))
    assert prompt_chain(request(), 64) == []


def sglang(**parameters: object) -> SglangCacheAware:
    plugin = SglangCacheAwareScorer(**parameters)
    plugin.check()
    live = plugin.open("mine")
    live.endpoints_changed(endpoints(4))
    return live


@pytest.mark.parametrize(
    ("open_requests", "match", "scores"),
    [
        ([0, 0, 0], [3, 10, 0], [0.3, 1.0, 0.0]),
        ([64, 0, 0], [10, 0, 0], [1.0, 0.0, 0.0]),  # not more than 64 apart
        ([65, 0, 0], [10, 0, 0], [0.0, 1.0, 1.0]),
        ([300, 200, 250], [10, 0, 0], [1.0, 0.0, 0.0]),  # not more than 1.5 times as many
        ([301, 200, 250], [10, 0, 0], [0.0, 1.0, 51 / 101]),
        ([0, 0, 0], [3, 2, 0], [1.0, 1.0, 1.0]),  # not more than 0.3 of the prompt, and all trees empty
        ([0, 0, 0], [4, 2, 0], [0.4, 0.2, 0.0]),
    ],
)
def test_matches_decide_until_load_is_uneven(
    open_requests: list[float], match: list[float], scores: list[float]
) -> None:
    view = candidates(inflight_requests=open_requests, match=match, total=[10] * 3, block=[64] * 3)
    assert sglang().score(request(), view).tolist() == pytest.approx(scores)


def test_what_nobody_knows_goes_to_the_smallest_tree() -> None:
    live = sglang(max_tree_size=4 * 1000)
    view = candidates(match=[0] * 3, total=[10] * 3, block=[64] * 3, uncached_tokens=[600, 100, 200])
    for position in (0, 1, 2):
        send(live, request(), view, position)
    assert live.score(request(), view).tolist() == [0.0, 1.0, 0.8]
    send(live, request(), view, 0)
    assert live.score(request(), view)[2] == pytest.approx(800 / 900)  # of at most 1000 tokens
    live.endpoints_changed([endpoint(1), endpoint(2)])
    live.endpoints_changed(endpoints(3))
    assert live.score(request(), view).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("{type: dynamo-cost-scorer, parameters: {prefillLoadScale: -1}}", "prefillLoadScale"),
        ("{type: dynamo-cost-scorer, parameters: {overlapCredit: 1.1}}", "between 0 and 1"),
        ("{type: dynamo-cost-scorer, parameters: {blockSizeTokens: 0}}", "at least 1"),
        ("{type: sglang-cache-aware-scorer, parameters: {cacheThreshold: 2}}", "between 0 and 1"),
        ("{type: sglang-cache-aware-scorer, parameters: {balanceAbsThreshold: -1}}", "balanceAbsThreshold"),
        ("{type: sglang-cache-aware-scorer, parameters: {balanceRelThreshold: 0.5}}", "at least 1"),
        ("{type: sglang-cache-aware-scorer, parameters: {maxTreeSize: 0}}", "maxTreeSize"),
        ("{type: power-of-two-picker, parameters: {maxNumOfEndpoints: 0}}", "maxNumOfEndpoints"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(plugin: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        router_of(f"plugins: [{plugin}]", pool_of(endpoints(1)))
