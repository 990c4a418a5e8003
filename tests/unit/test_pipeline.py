"""Filters in order, scores clamped and weighted, one picker."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from llmd_sched.errors import NoneLeft
from llmd_sched.plugin import Filter, Scorer
from llmd_sched.sched.pickers import MaxScorePicker
from llmd_sched.sched.pipeline import Picked, Profile
from llmd_sched.types import Array, Candidates, Request
from tests.builders import candidates, request


class Above(Filter, frozen=True):
    """Keeps endpoints whose queue is longer than ``least``."""

    least: float

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        return candidates.column("waiting") > self.least


class Fixed(Scorer, frozen=True):
    """Scores by queue length, times ``factor``."""

    factor: float = 1.0

    def score(self, request: Request, candidates: Candidates) -> Array:
        return candidates.column("waiting") * self.factor


def run(
    waiting: list[float],
    filters: tuple[Filter, ...] = (),
    scorers: tuple[tuple[Scorer, float], ...] = (),
    count: int = 1,
) -> Picked:
    profile = Profile("p", filters, scorers, MaxScorePicker(max_num_of_endpoints=count))
    return profile.run(request(), candidates(waiting=waiting), Random(0))


def test_scores_are_clamped_before_they_are_weighted() -> None:
    picked = run([-3.0, 0.25, 0.5, 7.0], scorers=((Fixed(), 2.0),))
    assert picked.scores.tolist() == [0.0, 0.5, 1.0, 2.0]


def test_weighted_scores_are_added() -> None:
    picked = run([0.2, 0.4], scorers=((Fixed(), 2.0), (Fixed(factor=-1.0), 5.0), (Fixed(factor=0.5), 1.0)))
    assert picked.scores == pytest.approx([0.5, 1.0])


def test_a_weight_of_zero_silences_a_scorer() -> None:
    assert run([0.2, 0.4], scorers=((Fixed(), 0.0),)).scores.tolist() == [0.0, 0.0]


def test_without_scorers_every_candidate_has_a_chance() -> None:
    firsts = set()
    for seed in range(40):
        profile = Profile("p", (), (), MaxScorePicker())
        firsts.add(int(profile.run(request(), candidates(3), Random(seed)).order[0]))
    assert firsts == {0, 1, 2}


def test_filters_run_one_after_another_on_what_is_left() -> None:
    seen = []

    class Seeing(Above, frozen=True):
        """Above, noting what it saw."""

        def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
            seen.append(candidates.column("waiting").tolist())
            return super().keep(request, candidates, rng)

    picked = run([1, 2, 3, 4], filters=(Seeing(least=1), Seeing(least=2)), scorers=((Fixed(factor=0.1), 1.0),))
    assert seen == [[1, 2, 3, 4], [2, 3, 4]]
    assert picked.scored.tolist() == [2, 3]
    assert picked.scores == pytest.approx([0.3, 0.4])


def test_what_is_picked_is_told_as_rows_of_the_whole_column() -> None:
    picked = run([0.9, 0.1, 0.5], filters=(Above(least=0.05), Above(least=0.2)), scorers=((Fixed(), 1.0),), count=2)
    assert picked.order.tolist() == [0, 2]
    later = run([0.1, 0.1, 0.5, 0.8], filters=(Above(least=0.2),), scorers=((Fixed(), 1.0),))
    assert later.order.tolist() == [3]


@pytest.mark.parametrize(("wanted", "given"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_a_picker_gives_as_many_as_it_is_asked_for_and_there_are(wanted: int, given: int) -> None:
    assert len(run([1, 2, 3], count=wanted).order) == given


def test_filters_that_leave_nothing_refuse_the_request() -> None:
    with pytest.raises(NoneLeft, match="no endpoints available"):
        run([1, 2], filters=(Above(least=9),))


def test_no_filter_runs_after_one_that_left_nothing() -> None:
    class Failing(Filter, frozen=True):
        """Must not be asked."""

        def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
            raise AssertionError

    with pytest.raises(NoneLeft):
        run([1, 2], filters=(Above(least=9), Failing()))
