"""The trainer as a value without a clock: the child process wraps it in wall time, the simulator in virtual time."""

from __future__ import annotations

from typing import get_args

from llmd_sched.predict.base import TargetName
from llmd_sched.predict.fit import DEFAULT, Recipe, fit
from llmd_sched.predict.model import Model
from llmd_sched.predict.window import Window
from llmd_sched.types import Sample


class InlineTrainer:
    """Refits when enough is new, at most every ``interval_s``. ``model`` is the one in use.

    The first fit comes with the ``first_samples``-th sample, later ones with ``least_new`` more each.
    """

    def __init__(
        self,
        model: Model | None = None,
        window: Window | None = None,
        *,
        interval_s: float = 1.0,
        first_samples: int = 50,
        least_new: int = 20,
        recipe: Recipe = DEFAULT,
    ) -> None:
        self.model = model or Model.cold()
        self.window = window or Window()
        self.samples = 0
        self.published = 0
        self.rejected = 0
        """Fits of one target that the gate refused."""
        self._interval_s, self._least_new, self._recipe = interval_s, least_new, recipe
        self._next_fit_at = first_samples
        self._not_before_s = float("-inf")

    @property
    def refused(self) -> int:
        """Labels that were no measurement."""
        return self.window.refused

    def add(self, sample: Sample) -> None:
        if self.window.add(sample):
            self.samples += 1

    def due(self, now_s: float) -> bool:
        return self.samples >= self._next_fit_at and now_s >= self._not_before_s

    def tick(self, now_s: float) -> Model | None:
        """Refit if it is due; returns the new model when one was published."""
        if not self.due(now_s):
            return None
        self._next_fit_at = self.samples + self._least_new
        self._not_before_s = now_s + self._interval_s
        candidate = fit(self.window, self.model, self.model.version + 1, now_s, self.samples, self._recipe)
        self.rejected += self._count_rejected(candidate)
        if candidate is None:
            return None
        self.model = candidate
        self.published += 1
        return candidate

    def _count_rejected(self, candidate: Model | None) -> int:
        """Targets that had labels and yet kept the fit in use."""
        had_labels = [name for name in get_args(TargetName) if self.window.size(name)]
        return sum(candidate is None or candidate.target(name) is self.model.target(name) for name in had_labels)
