"""What the trainer remembers: a sliding window in strata, so that a quiet night does not erase the rush hour."""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import features as f
from llmd_sched.predict.base import TargetName
from llmd_sched.types import Array, Sample

_WAITING = np.array([1.0, 3.0, 6.0, 11.0])
_PREFILL = np.array([512.0, 2_048.0, 8_192.0, 32_768.0, 131_072.0])
_CACHED_SHARE = np.array([0.25, 0.5, 0.75])
"""Where one bucket ends and the next begins; a stratum is one bucket of each."""

STRATA = (len(_WAITING) + 1) * (len(_PREFILL) + 1) * (len(_CACHED_SHARE) + 1)


class Labelled(NamedTuple):
    """Rows of one target, oldest first."""

    X: NDArray[np.float64]
    """(n, F) feature rows."""
    y_ms: Array
    """(n,) labels, finite and positive."""
    age: NDArray[np.int64]
    """(n,) how many labels of this target arrived since; the newest is 0 unless it has been evicted."""
    at_s: Array
    """(n,) when the label was taken."""


class Window:
    """The newest labelled rows of each target, at most ``cap`` in all and ``cap_per_stratum`` of one kind.

    Within a full stratum the newest row replaces the oldest; when the whole is full, the largest stratum gives up
    its oldest. Memory is allocated once.
    """

    def __init__(self, cap: int = 5000, cap_per_stratum: int = 500) -> None:
        self._targets = {name: _Rings(cap, min(cap, cap_per_stratum)) for name in get_args(TargetName)}
        self.refused = 0
        """Labels that were no positive finite number, and labels whose row was malformed or not finite."""

    def add(self, sample: Sample) -> int:
        """Keep the sample's labels; returns how many of the two were kept. Refused ones are counted."""
        row = np.array(sample.row, dtype=np.float64)
        row_fits = row.shape == (len(f.FEATURES),) and bool(np.isfinite(row).all())
        kept = 0
        for name, label_ms in (("ttft", sample.ttft_ms), ("tpot", sample.tpot_ms)):
            if label_ms is None:
                continue
            if row_fits and np.isfinite(label_ms) and label_ms > 0.0:
                self._targets[name].push(stratum(row), row, label_ms, sample.at_s)
                kept += 1
            else:
                self.refused += 1
        return kept

    def arrays(self, target: TargetName) -> Labelled:
        """Copies of everything held for the target, oldest first."""
        return self._targets[target].labelled()

    def size(self, target: TargetName) -> int:
        return int(self._targets[target].count.sum())


def stratum(row: NDArray[np.float64]) -> int:
    """The stratum of one row, 0 .. STRATA - 1: how much waits, how much prefill is ahead, how much of it is cached."""
    waiting = int(np.searchsorted(_WAITING, row[f.WAITING], side="right"))
    prefill = int(np.searchsorted(_PREFILL, row[f.UNCACHED] + row[f.INFLIGHT_PREFILL], side="right"))
    cached_share = 1.0 - row[f.UNCACHED] / max(row[f.INPUT], 1.0)
    cached = int(np.searchsorted(_CACHED_SHARE, cached_share, side="right"))
    return (waiting * (len(_PREFILL) + 1) + prefill) * (len(_CACHED_SHARE) + 1) + cached


class _Rings:
    """One ring of rows per stratum, in one block of memory."""

    def __init__(self, cap: int, cap_per_stratum: int) -> None:
        shape = (STRATA, cap_per_stratum)
        self.cap, self.width = cap, cap_per_stratum
        self.X = np.zeros((*shape, len(f.FEATURES)))
        self.y_ms, self.at_s = np.zeros(shape), np.zeros(shape)
        self.order = np.full(shape, -1, dtype=np.int64)  # the label's number in its stream; -1 = an empty place
        self.begin = np.zeros(STRATA, dtype=np.int64)
        self.count = np.zeros(STRATA, dtype=np.int64)
        self.arrived = 0

    def push(self, stratum: int, row: NDArray[np.float64], label_ms: float, at_s: float) -> None:
        if self.count[stratum] == self.width:
            self._drop_oldest(stratum)
        elif self.count.sum() >= self.cap:
            self._drop_oldest(int(self.count.argmax()))
        place = stratum, (self.begin[stratum] + self.count[stratum]) % self.width
        self.X[place], self.y_ms[place], self.at_s[place], self.order[place] = row, label_ms, at_s, self.arrived
        self.count[stratum] += 1
        self.arrived += 1

    def _drop_oldest(self, stratum: int) -> None:
        self.order[stratum, self.begin[stratum]] = -1
        self.begin[stratum] = (self.begin[stratum] + 1) % self.width
        self.count[stratum] -= 1

    def labelled(self) -> Labelled:
        places = np.nonzero(self.order.ravel() >= 0)[0]
        order = self.order.ravel()[places]
        places = places[np.argsort(order)]
        X = self.X.reshape(-1, len(f.FEATURES))[places]
        age = self.arrived - 1 - self.order.ravel()[places]
        return Labelled(X, self.y_ms.ravel()[places], age, self.at_s.ravel()[places])
