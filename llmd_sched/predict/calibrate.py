"""Quantiles of what will be measured: an offset to the point forecast's logarithm, adapted with every outcome.

The offset of level q moves up by q and down by 1 - q of a step, so that in the long run the share q of outcomes stays
below it whatever the distribution does (quantile tracking; Angelopoulos, Candes and Tibshirani, NeurIPS 2023). The
step follows the size of the errors. One offset for everything, and one per group once the group has shown enough: an
engine class, its queue (empty or not), and the prediction's order of magnitude, for noise is rarely proportional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import features as f
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.model import MIN_MS, Model
from llmd_sched.types import QUANTILES, Sample

COLD_OFFSETS = (0.0, 0.7)
"""Before anything was measured: the preset is right, or what is measured is twice as long."""
STEP = 0.2
MEMORY = 100
"""The mean size of an error forgets at this many."""
LEAST_OF_GROUP = 30

_EVERYTHING = -1
_MAGNITUDE, _MAGNITUDES = math.log(4.0), 12
"""Predictions below 4 ms are of one magnitude, then up to 16 ms, 64 ms, ..., and all beyond 70 minutes."""


class Calibrator:
    """Offsets of both targets. Not thread safe: one event loop owns it."""

    def __init__(self) -> None:
        self._targets = {name: _Offsets(COLD_OFFSETS) for name in get_args(TargetName)}

    def publish(self, model: Model) -> None:
        """The first learned fit of a target brings its own offsets, from rows it had not seen."""
        for name, offsets in self._targets.items():
            held_out = model.target(name).held_out_quantiles
            if offsets.cold and len(held_out) == len(QUANTILES):
                self._targets[name] = _Offsets(held_out, cold=False)

    def learn(self, sample: Sample) -> None:
        for name, predicted_ms, measured_ms in (
            ("ttft", sample.predicted_ttft_ms, sample.ttft_ms),
            ("tpot", sample.predicted_tpot_ms, sample.tpot_ms),
        ):
            if measured_ms is not None and measured_ms > 0.0 and predicted_ms > 0.0:
                group = group_of(sample.row, predicted_ms)
                self._targets[name].learn(group, math.log(measured_ms / predicted_ms))

    def factors(self, target: TargetName, group: int) -> tuple[float, ...]:
        """At each of QUANTILES, what the point forecast of one row is multiplied by."""
        return tuple(math.exp(offset) for offset in self._targets[target].of(group))

    def factor(
        self, target: TargetName, level: int, rows: NDArray[np.float64], predicted_ms: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The factors (n,) of many rows (n, F) and their predictions (n,) at ``QUANTILES[level]``."""
        magnitude = np.clip(np.floor(np.log(np.maximum(predicted_ms, MIN_MS)) / _MAGNITUDE), 0, _MAGNITUDES - 1)
        place = 2 * rows[:, f.ENGINE_CLASS] + (rows[:, f.WAITING] > 0.0)
        which, at = np.unique(_MAGNITUDES * place + magnitude, return_inverse=True)
        return np.exp([self._targets[target].of(int(group))[level] for group in which])[at]


def group_of(row: Sequence[float] | NDArray[np.float64], predicted_ms: float) -> int:
    """The group of one feature row and its prediction."""
    magnitude = min(max(math.floor(math.log(max(predicted_ms, MIN_MS)) / _MAGNITUDE), 0), _MAGNITUDES - 1)
    return _MAGNITUDES * (2 * int(row[f.ENGINE_CLASS]) + (row[f.WAITING] > 0.0)) + magnitude


class _Offsets:
    """One target's, by group."""

    def __init__(self, start: tuple[float, ...], *, cold: bool = True) -> None:
        self.cold = cold
        self._tracks: dict[int, _Track] = {_EVERYTHING: _Track(start)}

    def of(self, group: int) -> list[float]:
        track = self._tracks.get(group)
        return (track if track and track.count >= LEAST_OF_GROUP else self._tracks[_EVERYTHING]).offsets

    def learn(self, group: int, log_ratio: float) -> None:
        everything = self._tracks[_EVERYTHING]
        if group not in self._tracks:
            self._tracks[group] = _Track(tuple(everything.offsets))
        everything.learn(log_ratio)
        self._tracks[group].learn(log_ratio)


class _Track:
    __slots__ = ("count", "offsets", "scales")

    def __init__(self, start: tuple[float, ...]) -> None:
        self.offsets = list(start)
        self.count = 0
        self.scales = [0.0] * len(start)
        """Mean distance of the outcomes from each offset: a step's unit, so that one that is far off comes fast."""

    def learn(self, log_ratio: float) -> None:
        self.count += 1
        for level, quantile in enumerate(QUANTILES):
            distance = abs(log_ratio - self.offsets[level])
            if self.count > 5:
                distance = min(distance, 3.0 * self.scales[level])  # one stall must not make every later step a leap
            self.scales[level] += (distance - self.scales[level]) / min(self.count, MEMORY)
            above = log_ratio > self.offsets[level]
            step = STEP * max(self.scales[level], 0.002)
            self.offsets[level] += step * (quantile if above else quantile - 1.0)
