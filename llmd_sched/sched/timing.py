"""How long each plugin of a profile takes, for a sample of the decisions: timing them all would double their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmd_sched.plugin import Picker
from llmd_sched.sched.handlers import Scheduling
from llmd_sched.sched.pipeline import Profile
from llmd_sched.types import Array, Candidates, Request

Timing = tuple[str, str, str, float, float]
"""Extension point, plugin type, plugin name, when it began and how long it took, in seconds of the timer."""


class _Timed:
    def __init__(self, one: Any, what: tuple[str, str, str], timer: Callable[[], float], notes: list[Timing]) -> None:
        self._one, self._what, self._timer, self._notes = one, what, timer, notes

    def _note(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        began_s = self._timer()
        done = verb(*arguments)
        self._notes.append((*self._what, began_s, self._timer() - began_s))
        return done

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        kept: NDArray[np.bool_] = self._note(self._one.keep, request, candidates, rng)
        return kept

    def score(self, request: Request, candidates: Candidates) -> Array:
        scores: Array = self._note(self._one.score, request, candidates)
        return scores


class _TimedPicker(_Timed):
    @property
    def max_num_of_endpoints(self) -> int:
        return int(self._one.max_num_of_endpoints)

    def order(self, scores: Array, rng: Random) -> NDArray[np.intp]:
        order: NDArray[np.intp] = self._note(self._one.order, scores, rng)
        return order


def timed(
    scheduling: Scheduling, types: Mapping[str, str], timer: Callable[[], float], notes: list[Timing]
) -> Scheduling:
    """The same, adding a Timing to ``notes`` for each plugin that ran. ``types``: name of a plugin -> its type."""

    def around(one: Any, point: str, name: str, kind: type[_Timed] = _Timed) -> Any:
        return kind(one, (point, types.get(name, name), name), timer, notes)

    def wrapped(profile: Profile) -> Profile:
        filters = zip(profile.filters, profile.names, strict=True)
        scorers = zip(profile.scorers, profile.scorer_names, strict=True)
        picker: Picker = around(profile.picker, "Picker", profile.picker_name, _TimedPicker)
        return replace(
            profile,
            filters=tuple(around(one, "Filter", name) for one, name in filters),
            scorers=tuple((around(one, "Scorer", name), weight) for (one, weight), name in scorers),
            picker=picker,
        )

    return replace(scheduling, profiles={name: wrapped(profile) for name, profile in scheduling.profiles.items()})
