"""Scores to an order of preference; where chance decides, it decides in proportion."""

from __future__ import annotations

from collections import Counter
from math import sqrt
from random import Random

import numpy as np
import pytest

from llmd_sched.plugin import Picker
from llmd_sched.sched.pickers import PICKERS, MaxScorePicker, RandomPicker, WeightedRandomPicker

DRAWS = 20_000


def firsts(picker: Picker, scores: list[float], draws: int = DRAWS) -> Counter[int]:
    rng, array = Random(7), np.array(scores)
    return Counter(int(picker.order(array, rng)[0]) for _ in range(draws))


def assert_shares(counts: Counter[int], shares: list[float]) -> None:
    """Each count within five standard deviations of its binomial mean."""
    total = sum(counts.values())
    for i, share in enumerate(shares):
        assert abs(counts[i] - total * share) <= 5 * sqrt(total * share * (1 - share)), (i, counts)


@pytest.mark.parametrize("picker", [kind() for kind in PICKERS.values()], ids=list(PICKERS))
@pytest.mark.parametrize("scores", [[1.0], [0.0, 0.0], [0.2, 0.9, 0.9, 0.0, -1.0]])
def test_every_order_is_a_permutation(picker: Picker, scores: list[float]) -> None:
    assert sorted(picker.order(np.array(scores), Random(1))) == list(range(len(scores)))


def test_max_score_orders_from_best_to_worst() -> None:
    assert MaxScorePicker().order(np.array([0.1, 3.0, 0.5, -1.0]), Random(0)).tolist() == [1, 2, 0, 3]


def test_max_score_breaks_ties_at_random_and_evenly() -> None:
    assert_shares(firsts(MaxScorePicker(), [0.9, 0.2, 0.9, 0.9]), [1 / 3, 0.0, 1 / 3, 1 / 3])


def test_random_ignores_the_scores() -> None:
    assert_shares(firsts(RandomPicker(), [9.0, 0.0, 1.0, 0.0]), [0.25] * 4)


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        ([1.0, 1.0], [0.5, 0.5]),
        ([0.6, 0.3, 0.1], [0.6, 0.3, 0.1]),
        ([7.0, 2.0, 1.0], [0.7, 0.2, 0.1]),
        ([0.02, 0.06], [0.25, 0.75]),
        ([0.5, 0.0, 0.5], [0.5, 0.0, 0.5]),
        ([0.0, 0.0], [0.5, 0.5]),  # nobody scored: at random
        ([-1.0, -5.0], [0.5, 0.5]),
        ([3e-4, 1e-4], [0.75, 0.25]),  # small weights are weights too
    ],
)
def test_weighted_random_picks_in_proportion_to_the_score(scores: list[float], shares: list[float]) -> None:
    assert_shares(firsts(WeightedRandomPicker(), scores), shares)


def test_weighted_random_picks_its_second_without_replacement() -> None:
    rng, scores = Random(3), np.array([0.5, 0.3, 0.2])
    orders = [WeightedRandomPicker().order(scores, rng).tolist() for _ in range(DRAWS)]
    pairs = Counter(i * 3 + j for i, j, _ in orders)
    shares = [0.0 if i == j else scores[i] * scores[j] / (1 - scores[i]) for i in range(3) for j in range(3)]
    assert_shares(pairs, shares)


def test_scores_of_nothing_come_last_in_any_order() -> None:
    orders = {tuple(WeightedRandomPicker().order(np.array([0.0, 1.0, -2.0]), Random(s)).tolist()) for s in range(50)}
    assert orders == {(1, 0, 2), (1, 2, 0)}


@pytest.mark.parametrize("picker", [kind() for kind in PICKERS.values()], ids=list(PICKERS))
def test_the_same_seed_gives_the_same_order(picker: Picker) -> None:
    scores = np.array([0.5, 0.5, 0.1, 0.9])
    assert picker.order(scores, Random(5)).tolist() == picker.order(scores, Random(5)).tolist()


@pytest.mark.parametrize("kind", PICKERS.values(), ids=list(PICKERS))
@pytest.mark.parametrize("count", [0, -1])
def test_a_picker_picks_at_least_one(kind: type[Picker], count: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        kind(max_num_of_endpoints=count).check()
