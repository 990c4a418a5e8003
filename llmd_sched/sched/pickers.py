"""Pickers: scores -> an order of preference. The first ``maxNumOfEndpoints`` go into the destination header."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from llmd_sched.plugin import Picker
from llmd_sched.types import Array


class MaxScorePicker(Picker, frozen=True):
    """The highest score; ties at random."""

    def order(self, scores: Array, rng: Random) -> NDArray[np.intp]:
        shuffled = _shuffled(len(scores), rng)
        return shuffled[np.argsort(-scores[shuffled], kind="stable")]


class RandomPicker(Picker, frozen=True):
    """Any candidate, whatever its score."""

    def order(self, scores: Array, rng: Random) -> NDArray[np.intp]:
        return _shuffled(len(scores), rng)


class WeightedRandomPicker(Picker, frozen=True):
    """At random in proportion to the score, without replacement.

    Efraimidis and Spirakis (2006): the largest keys U^(1/score) win, compared by their logarithms so that small
    scores do not underflow. Scores of 0 or less come last, at random.
    """

    def order(self, scores: Array, rng: Random) -> NDArray[np.intp]:
        draws = np.array([1.0 - rng.random() for _ in range(len(scores))])  # in (0, 1]
        positive = scores > 0
        keys = np.where(positive, np.log(draws) / np.where(positive, scores, 1.0), draws)
        return np.lexsort((-keys, ~positive))


def _shuffled(n: int, rng: Random) -> NDArray[np.intp]:
    order = list(range(n))
    rng.shuffle(order)
    return np.array(order, dtype=np.intp)


PICKERS: dict[str, type[Picker]] = {
    "max-score-picker": MaxScorePicker,
    "random-picker": RandomPicker,
    "weighted-random-picker": WeightedRandomPicker,
}
