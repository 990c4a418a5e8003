"""Cold prompts go round; warm ones change nothing."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.plugin import reads
from llmd_sched.router import Router
from llmd_sched.sched.lru import NoHitLru, NoHitLruScorer
from llmd_sched.types import Candidates, Decision, Request, Stage
from tests.builders import (
    CONFIG_HEAD,
    PREFIX,
    asking,
    candidates,
    decision,
    endpoint,
    endpoints,
    pool_of,
    prompt,
    request,
    router_of,
)

ASKED = request()


def opened(**parameters: object) -> NoHitLru:
    live = NoHitLruScorer(**parameters).open("mine")
    live.endpoints_changed(endpoints(10))
    return live


def cold(count: int) -> Candidates:
    return candidates(match=[0] * count, total=[4] * count)


def take(live: NoHitLru, view: Candidates, position: int, asked: Request = ASKED, prefill: int | None = None) -> None:
    """One request that is scored and then sent to ``position``."""
    live.score(asked, view)
    made = decision("t", asked, view.endpoints[position])
    if prefill is not None:
        made = msgspec.structs.replace(made, stages=(Stage("prefill", (view.endpoints[prefill],), prefill),))
    live.chosen(made, view, position, 0.0)


@pytest.mark.parametrize(
    ("count", "used", "scores"),
    [
        (1, [], [1.0]),
        (1, [0], [1.0]),
        (2, [], [1.0, 0.0]),
        (2, [0], [0.0, 1.0]),
        (2, [0, 1], [1.0, 0.0]),
        (3, [], [1.0, 0.5, 0.0]),
        (3, [0], [0.0, 1.0, 0.5]),  # those never used first, in the order of the list
        (3, [1, 0], [0.0, 0.5, 1.0]),
        (3, [0, 1, 2], [1.0, 0.5, 0.0]),
        (3, [0, 1, 2, 0], [0.0, 1.0, 0.5]),
        (5, [3, 1], [1.0, 0.0, 0.75, 0.25, 0.5]),
    ],
)
def test_the_one_whose_last_cold_prompt_is_longest_ago_scores_highest(
    count: int, used: list[int], scores: list[float]
) -> None:
    live, view = opened(), cold(count)
    for position in used:
        take(live, view, position)
    assert live.score(ASKED, view).tolist() == pytest.approx(scores)


@pytest.mark.parametrize("match", [[0, 0, 1], [4, 4, 4], [0.5, 0, 0]])
def test_a_prompt_that_anybody_has_some_of_scores_alike_everywhere(match: list[float]) -> None:
    live = opened()
    assert live.score(ASKED, candidates(match=match, total=[4] * 3)).tolist() == [0.5, 0.5, 0.5]


def test_without_information_every_prompt_is_cold() -> None:
    assert opened().score(ASKED, candidates(3)).tolist() == [1.0, 0.5, 0.0]


def test_a_warm_prompt_does_not_count_as_use() -> None:
    live = opened()
    take(live, candidates(match=[1, 0], total=[4, 4]), 0)
    assert live.score(ASKED, cold(2)).tolist() == [1.0, 0.0]


def test_a_request_that_was_not_scored_does_not_count_as_use() -> None:
    live, view = opened(), cold(2)
    live.score(ASKED, view)
    live.chosen(decision("t", request(id="another"), view.endpoints[0]), view, 0, 0.0)
    assert live.score(ASKED, view).tolist() == [1.0, 0.0]


def test_the_profile_that_scored_last_says_whether_a_request_is_cold() -> None:
    live, view = opened(), cold(2)
    live.score(ASKED, view)
    take(live, candidates(match=[1, 0], total=[4, 4]), 0)
    assert live.score(ASKED, view).tolist() == [1.0, 0.0]


def test_an_endpoint_is_used_once_per_request() -> None:
    live, view = opened(), cold(3)
    take(live, view, 0)
    live.chosen(decision("t", ASKED, view.endpoints[1]), view, 1, 0.0)
    assert live.score(ASKED, view).tolist() == [0.0, 1.0, 0.5]


def test_who_prefills_is_used_too_and_last() -> None:
    live, view = opened(), cold(3)
    take(live, view, 1, prefill=0)
    assert live.score(ASKED, view).tolist() == [0.0, 0.5, 1.0]


def test_ranks_are_among_the_candidates_of_a_profile_only() -> None:
    live, view = opened(), cold(4)
    for decode, prefill in ((2, 0), (3, 1)):
        take(live, view, decode, prefill=prefill)
    prefillers = view.keep(np.array([True, True, False, False]))
    assert live.score(ASKED, prefillers).tolist() == [1.0, 0.0]


def test_more_endpoints_than_are_remembered_forget_the_oldest() -> None:
    live, view = opened(lru_size=2), cold(4)
    for position in (0, 1, 2):
        take(live, view, position)
    assert live.score(ASKED, view).tolist() == pytest.approx([1.0, 1 / 3, 0.0, 2 / 3])


@pytest.mark.parametrize("size", [0, -1])
def test_no_size_is_the_usual_one(size: int) -> None:
    live, view = opened(lru_size=size), cold(3)
    for position in (0, 1, 2):
        take(live, view, position)
    assert live.score(ASKED, view).tolist() == [1.0, 0.5, 0.0]


def test_an_endpoint_that_leaves_and_returns_was_never_used() -> None:
    live, view = opened(), cold(3)
    for position in (0, 1, 2):
        take(live, view, position)
    live.endpoints_changed([endpoint(0), endpoint(2)])
    live.endpoints_changed(endpoints(3))
    assert live.score(ASKED, view).tolist() == [0.5, 1.0, 0.0]


def test_it_asks_for_prefix_matches_of_the_producer_that_is_named() -> None:
    assert NoHitLruScorer().reads()[0].producer == PREFIX
    named = NoHitLruScorer(prefix_match_info_producer_name="precise")
    assert named.reads() == (reads(named.reads()[0].attribute, "precise"),)
    live = named.open("mine")
    view = candidates(**{"prefix_match_blocks/precise": [1.0, 0.0]})
    assert live.score(ASKED, view).tolist() == [0.5, 0.5]


def test_parameters_the_reference_never_used_are_accepted() -> None:
    text = "plugins: [{type: no-hit-lru-scorer, parameters: {lruSize: 9, prefixPluginType: a, prefixPluginName: b}}]"
    assert resolve(load(CONFIG_HEAD + text)).producers == (PREFIX, "no-hit-lru-scorer")


def sent(router: Router, seed: int) -> Decision:
    return router.choose(asking(prompt(2, seed=seed)), None, 0.0)


def test_cold_prompts_visit_every_endpoint_before_any_twice_and_warm_ones_stay() -> None:
    router = router_of(
        "plugins: [{type: no-hit-lru-scorer}, {type: prefix-cache-scorer}]\n"
        "schedulingProfiles: [{name: p, plugins: [{pluginRef: no-hit-lru-scorer}, "
        "{pluginRef: prefix-cache-scorer, weight: 3}]}]",
        pool_of(endpoints(4)),
    )
    first = [sent(router, seed).picked[0].name for seed in range(4)]
    assert first == ["e0", "e1", "e2", "e3"]
    assert sent(router, 2).picked[0].name == "e2"
    assert [sent(router, seed).picked[0].name for seed in range(4, 8)] == first
