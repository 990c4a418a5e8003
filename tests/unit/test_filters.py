"""Which candidates stay."""

from __future__ import annotations

from random import Random

import pytest

from llmd_sched.plugin import Filter
from llmd_sched.sched.filters import PrefixCacheAffinityFilter, SloHeadroomTierFilter
from llmd_sched.types import Candidates
from tests.builders import candidates, predicted, request


class Draw(Random):
    """Draws one number, again and again, and counts."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value, self.drawn = value, 0

    def random(self) -> float:
        self.drawn += 1
        return self.value


def kept(one: Filter, view: Candidates, draw: float = 0.999) -> list[bool]:
    return one.keep(request(), view, Draw(draw)).tolist()


@pytest.mark.parametrize(
    ("match", "threshold", "expected"),
    [
        ([10, 0, 8], 0.8, [True, False, True]),
        ([7, 0, 5], 0.8, [True, True, True]),  # nobody reaches it
        ([10, 9, 8], 0.8, [True, True, True]),
        ([10, 9.9, 0], 0.99, [True, True, False]),
        ([10, 0, 0], 1.0, [True, False, False]),
        ([10, 0, 0], 0.0, [True, True, True]),  # off
        ([10, 0, 0], -1.0, [True, True, True]),
        ([0], 0.8, [True]),
        ([10], 0.8, [True]),
    ],
)
def test_endpoints_with_enough_of_the_prompt_are_kept_alone(
    match: list[float], threshold: float, expected: list[bool]
) -> None:
    view = candidates(match=match, total=[10] * len(match))
    assert kept(PrefixCacheAffinityFilter(affinity_threshold=threshold), view) == expected


def test_without_match_information_everything_stays() -> None:
    assert kept(PrefixCacheAffinityFilter(), candidates(3)) == [True, True, True]
    assert kept(PrefixCacheAffinityFilter(), candidates(match=[0, 0], total=[0, 0])) == [True, True]


@pytest.mark.parametrize(
    ("sticky_tokens", "other_tokens", "penalty_ms", "sticks"),
    [
        (0, 0, 1000, True),
        (1000, 0, 1000, True),  # exactly the penalty is not more
        (1001, 0, 1000, False),
        (5000, 4000, 1000, True),
        (5001, 4000, 1000, False),
        (9_999_999, 0, 0, True),  # 0: always stay
        (0, 5000, 1000, True),
    ],
)
def test_affinity_gives_way_when_its_best_is_too_far_behind(
    sticky_tokens: float, other_tokens: float, penalty_ms: float, sticks: bool
) -> None:
    one = PrefixCacheAffinityFilter(max_ttft_penalty_ms=penalty_ms, peak_prefill_throughput=1000.0)
    tokens = [sticky_tokens, sticky_tokens + 7, other_tokens, other_tokens + 9]
    view = candidates(match=[9, 9, 0, 0], total=[10] * 4, inflight_tokens=tokens)
    assert kept(one, view) == ([True, True, False, False] if sticks else [True] * 4)


def test_the_default_gap_is_that_of_the_reference() -> None:
    def view(tokens: float) -> Candidates:
        return candidates(match=[10, 0], total=[10, 10], inflight_tokens=[tokens, 0])

    assert kept(PrefixCacheAffinityFilter(), view(286_700)) == [True, False]
    assert kept(PrefixCacheAffinityFilter(), view(286_710)) == [True, True]


@pytest.mark.parametrize(("ttft_ms", "sticks"), [([5000, 1000], True), ([6100, 1000], False)])
def test_affinity_can_ask_the_prediction(ttft_ms: list[float], sticks: bool) -> None:
    one = PrefixCacheAffinityFilter(ttft_source="latencyPredictor", max_ttft_penalty_ms=5000)
    view = candidates(match=[10, 0], total=[10, 10], ttft_ms=ttft_ms, inflight_tokens=[9e9, 0])
    assert kept(one, view) == [True, not sticks]


@pytest.mark.parametrize("source", ["prefillThroughput", "latencyPredictor"])
def test_affinity_sticks_when_nobody_knows_the_wait(source: str) -> None:
    view = candidates(match=[10, 0], total=[10, 10])
    assert kept(PrefixCacheAffinityFilter(ttft_source=source), view) == [True, False]


@pytest.mark.parametrize(("draw", "expected"), [(0.09, [True, True]), (0.11, [True, False])])
def test_affinity_explores_with_its_probability(draw: float, expected: list[bool]) -> None:
    one = PrefixCacheAffinityFilter(exploration_probability=0.1)
    assert kept(one, candidates(match=[10, 0], total=[10, 10]), draw) == expected


def test_affinity_without_exploration_draws_nothing() -> None:
    dice = Draw(0.0)
    PrefixCacheAffinityFilter().keep(request(), candidates(match=[10, 0], total=[10, 10]), dice)
    assert dice.drawn == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"affinity_threshold": 1.1}, "at most 1"),
        ({"exploration_probability": -0.1}, "between 0 and 1"),
        ({"exploration_probability": 1.1}, "between 0 and 1"),
        ({"max_ttft_penalty_ms": -1.0}, "0 or more"),
        ({"ttft_source": "guess"}, "prefillThroughput or latencyPredictor"),
        ({"peak_prefill_throughput": 0.0}, "must be positive"),
    ],
)
def test_affinity_checks_its_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixCacheAffinityFilter(**parameters).check()


def test_the_throughput_matters_only_when_it_is_used() -> None:
    PrefixCacheAffinityFilter(ttft_source="latencyPredictor", peak_prefill_throughput=0.0).check()


@pytest.mark.parametrize(
    ("ttft", "tpot", "draw", "expected"),
    [
        ([5, -5, 0], [0, 0, 0], 0.5, [True, False, True]),
        ([5, 5, 5], [1, -1, 0], 0.5, [True, False, True]),
        ([5, -5, 0], [0, 0, 0], 0.005, [False, True, False]),
        ([5, -5, 0], [0, 0, 0], 0.01, [True, False, True]),  # strictly below epsilon
        ([5, 5], [0, 0], 0.0, [True, True]),
        ([-5, -5], [0, 0], 0.0, [True, True]),
        ([-5], [0], 0.5, [True]),
    ],
)
def test_the_tier_that_keeps_both_slos_is_preferred(
    ttft: list[float], tpot: list[float], draw: float, expected: list[bool]
) -> None:
    assert kept(SloHeadroomTierFilter(), predicted(ttft, tpot), draw) == expected


def test_without_predictions_no_tier_is_dropped() -> None:
    assert kept(SloHeadroomTierFilter(), candidates(3), 0.0) == [True, True, True]


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, float("nan")])
def test_the_tier_filter_checks_its_parameter(epsilon: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        SloHeadroomTierFilter(epsilon_explore_neg=epsilon).check()


def test_a_filter_sees_only_the_candidates_still_in_view() -> None:
    whole = candidates(match=[10, 0, 0], total=[10, 10, 10])
    view = whole.keep(~(whole.column("prefix_match_blocks/approx-prefix-cache-producer") == 10))
    assert kept(PrefixCacheAffinityFilter(), view) == [True, True]
