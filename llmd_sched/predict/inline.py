"""The trainer as a value without a clock: the child process wraps it in wall time, the simulator in virtual time."""

from __future__ import annotations

import math
from collections import deque
from typing import get_args

import numpy as np

from llmd_sched.predict.base import TargetName
from llmd_sched.predict.fit import DEFAULT, Recipe
from llmd_sched.predict.frames import Counts
from llmd_sched.predict.gate import next_model
from llmd_sched.predict.model import Made, Model
from llmd_sched.predict.window import Window
from llmd_sched.types import Sample

NEW_SHARE = 0.04
"""A refit waits for this share of the window to be new: what changes little is worth few refits."""


class InlineTrainer:
    """Refits when enough is new or a target drifted, at most every ``interval_s``. ``model`` is the one in use.

    The first fit comes with the ``first_samples``-th sample, later ones with ``least_new`` more each, or
    ``NEW_SHARE`` of the window if that is more.
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
        self.classes = self.model.classes
        """Names of the engine classes in the rows, by number; whoever feeds the trainer keeps it up to date."""
        self.counts = Counts()
        self._interval_s, self._least_new, self._recipe = interval_s, least_new, recipe
        self._first_samples = first_samples
        self._next_fit_at = first_samples
        self._not_before_s = -math.inf
        self._drift = {name: Drift() for name in get_args(TargetName)}
        self._drifted: set[TargetName] = set()
        self._alert: set[TargetName] = set()
        """Targets that drifted and have not had a usual fit since."""
        self._judged_from: dict[TargetName, int] = dict.fromkeys(get_args(TargetName), 1)
        """What an older version said, the preset or one that drift has replaced, is no news when it turns out wrong."""

    def add(self, sample: Sample) -> None:
        if self.window.add(sample):
            self.counts.samples += 1
            self._watch("ttft", sample.predicted_ttft_ms, sample.ttft_ms, sample.model_version)
            self._watch("tpot", sample.predicted_tpot_ms, sample.tpot_ms, sample.model_version)

    def _watch(self, name: TargetName, predicted_ms: float, measured_ms: float | None, version: int) -> None:
        if measured_ms is None or version < self._judged_from[name]:
            return
        if self._drift[name].add(predicted_ms, measured_ms, self.model.target(name).held_out_error):
            self.counts.drifts += 1
            self._drifted.add(name)

    def forget(self) -> None:
        """Empty the window; the model in use stays, and the next fit waits for ``first_samples`` more."""
        self.window.clear()
        self._drifted.clear()
        self._next_fit_at = self.counts.samples + self._first_samples

    def due(self, now_s: float) -> bool:
        enough = self.counts.samples >= self._next_fit_at or bool(self._drifted)
        return enough and now_s >= self._not_before_s

    def tick(self, now_s: float) -> Model | None:
        """Refit if it is due; returns the new model when one was published."""
        if not self.due(now_s):
            return None
        held = max(self.window.size(name) for name in get_args(TargetName))
        self._next_fit_at = self.counts.samples + max(self._least_new, int(NEW_SHARE * held))
        self._not_before_s = now_s + self._interval_s
        self._alert |= self._drifted
        self._drifted.clear()
        drifted = frozenset(self._alert)
        candidate = next_model(
            self.window,
            self.model,
            self.model.version + 1,
            now_s,
            self.counts.samples,
            self._recipe,
            drifted=drifted,
            classes=self.classes,
        )
        self._settle(candidate, drifted)
        if candidate is not None:
            self.model = candidate
        return candidate

    def _settle(self, candidate: Model | None, drifted: frozenset[TargetName]) -> None:
        self.counts.fits += 1
        self.counts.published += candidate is not None
        for name in get_args(TargetName):
            old = self.model.target(name)
            new = old if candidate is None else candidate.target(name)
            if new is old:
                self.counts.rejected += self.window.size(name) > 0
                continue
            if name in drifted and candidate is not None:
                self._judged_from[name] = candidate.version
            if new.made is Made.USUAL:
                self._alert.discard(name)
            self.counts.fallbacks += new.made is Made.BASE_ALONE


class Drift:
    """Live errors of one target against the error its fit had on rows it had not seen."""

    SEEN = 30
    """The median of this many newest errors counts, so stalls alone are no drift."""
    RATIO, MARGIN = 1.5, 0.15

    def __init__(self) -> None:
        self._errors: deque[float] = deque(maxlen=self.SEEN)

    def add(self, predicted_ms: float, measured_ms: float, accepted: float) -> bool:
        """True when the target has drifted; then it starts to look anew. ``accepted`` and errors are |log ratio|."""
        if not (predicted_ms > 0.0 and measured_ms > 0.0 and math.isfinite(accepted)):
            return False
        self._errors.append(abs(math.log(predicted_ms / measured_ms)))
        if len(self._errors) < self.SEEN:
            return False
        if np.median(self._errors) <= max(self.RATIO * accepted, accepted + self.MARGIN):
            return False
        self._errors.clear()
        return True
