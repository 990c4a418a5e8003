"""A scheduling profile: filters in order, weighted scorers, one picker."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from llmd_sched.errors import NoneLeft
from llmd_sched.plugin import Keeps, Picker, Scoring
from llmd_sched.types import Array, Candidates, Request, Verdict


@dataclass(frozen=True, slots=True)
class Picked:
    """What a profile decided. ``order`` are rows of the candidates' columns, best first; ``scores`` is aligned with
    ``scored``, the rows that were left after the filters. ``explored``: another one had a higher score."""

    order: NDArray[np.intp]
    scored: NDArray[np.intp]
    scores: Array
    explored: bool
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """``names`` of the filters, ``scorer_names`` and ``picker_name``: for whoever asks why, or how long."""

    name: str
    filters: tuple[Keeps, ...]
    scorers: tuple[tuple[Scoring, float], ...]
    picker: Picker
    names: tuple[str, ...] = ()
    scorer_names: tuple[str, ...] = ()
    picker_name: str = ""

    def run(self, request: Request, candidates: Candidates, rng: Random) -> Picked:
        """Raises NoneLeft when the filters leave nothing."""
        verdicts = []
        for i, one in enumerate(self.filters):
            candidates = candidates.keep(one.keep(request, candidates, rng))
            verdicts.append(Verdict(self.names[i] if self.names else str(i), candidates.index))
            if not len(candidates):
                raise NoneLeft("no endpoints available for the given request")
        scores = np.zeros(len(candidates))
        for scorer, weight in self.scorers:
            scores += weight * np.minimum(np.maximum(scorer.score(request, candidates), 0.0), 1.0)
        order = self.picker.order(scores, rng)[: self.picker.max_num_of_endpoints]
        explored = bool(scores[order[0]] < scores.max())
        return Picked(candidates.index[order], candidates.index, scores, explored, tuple(verdicts))
