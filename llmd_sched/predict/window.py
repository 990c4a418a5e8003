"""What the trainer remembers: a sliding window in strata, so that a quiet night does not erase the rush hour."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import features as f
from llmd_sched.predict.base import TargetName
from llmd_sched.types import Array, Sample

_WAITING = np.array([1.0, 3.0, 6.0, 11.0])
_PREFILL = np.array([512.0, 2_048.0, 8_192.0, 32_768.0, 131_072.0])
_CACHED_SHARE = np.array([0.25, 0.5, 0.75])
"""Where one bucket ends and the next begins; a stratum is one bucket of each, of one engine class."""

STRATA_PER_CLASS = (len(_WAITING) + 1) * (len(_PREFILL) + 1) * (len(_CACHED_SHARE) + 1)
MAX_ENDPOINTS = 4096
"""Endpoint names remembered at once, beyond those that still have rows."""


class Labelled(NamedTuple):
    """Rows of one target, oldest first."""

    X: NDArray[np.float64]
    """(n, F) feature rows."""
    y_ms: Array
    """(n,) labels, finite and positive."""
    age: NDArray[np.int64]
    """(n,) how many labels of this target and the same engine class arrived since."""
    at_s: Array
    """(n,) when the label was taken."""
    endpoint: NDArray[np.int32]
    """(n,) positions in ``endpoints``; 0 = not known."""
    endpoints: tuple[str, ...]

    @property
    def engine_class(self) -> NDArray[np.int64]:
        return self.X[:, f.ENGINE_CLASS].astype(np.int64)


class Caps(NamedTuple):
    """How many rows of one target are kept at most."""

    total: int = 8_000
    per_class: int = 4_000
    per_stratum: int = 400


class Window:
    """The newest labelled rows of each target, within ``caps``.

    Within a full stratum the newest row replaces the oldest; when a class or the whole is full, its largest stratum
    gives up its oldest. Memory is allocated once.
    """

    def __init__(self, caps: Caps | None = None) -> None:
        self.caps = caps or Caps()
        self._endpoints: dict[str, int] = {"": 0}
        self._targets = {name: _Rows(self.caps) for name in get_args(TargetName)}
        self.refused = 0
        """Labels that were no positive finite number, and labels whose row was malformed or not finite."""

    def add(self, sample: Sample) -> int:
        """Keep the sample's labels; returns how many of the two were kept. Refused ones are counted."""
        row = np.array(sample.row, dtype=np.float64)
        row_fits = row.shape == (len(f.FEATURES),) and bool(np.isfinite(row).all())
        row_fits = row_fits and 0.0 <= row[f.ENGINE_CLASS] < f.MAX_CLASSES
        kept = 0
        for name, label_ms in (("ttft", sample.ttft_ms), ("tpot", sample.tpot_ms)):
            if label_ms is None:
                continue
            if row_fits and np.isfinite(label_ms) and label_ms > 0.0:
                self._targets[name].push(row, label_ms, sample.at_s, self._endpoint(sample.endpoint))
                kept += 1
            else:
                self.refused += 1
        return kept

    def _endpoint(self, name: str) -> int:
        if name not in self._endpoints:
            if len(self._endpoints) >= MAX_ENDPOINTS:
                self._forget_endpoints()
            self._endpoints[name] = len(self._endpoints)
        return self._endpoints[name]

    def _forget_endpoints(self) -> None:
        """Renumber those that still have rows; the window's caps bound how many that are."""
        held = np.unique(np.concatenate([rows.endpoint[rows.filled] for rows in self._targets.values()] + [[0]]))
        names = list(self._endpoints)
        renumber = np.zeros(len(names), dtype=np.int32)
        renumber[held.astype(np.intp)] = np.arange(len(held))
        for rows in self._targets.values():
            rows.endpoint = renumber[rows.endpoint]
        self._endpoints = {names[int(i)]: number for number, i in enumerate(held)}

    def arrays(self, target: TargetName) -> Labelled:
        """Copies of everything held for the target, oldest first."""
        return self._targets[target].labelled(tuple(self._endpoints))

    def size(self, target: TargetName) -> int:
        return len(self._targets[target])

    def rows_by_class(self, target: TargetName) -> dict[int, int]:
        return {one: count for one, count in sorted(self._targets[target].per_class.items()) if count}

    def span_s(self, target: TargetName) -> tuple[float, float]:
        """When the oldest and the newest label were taken; NaN while there are none."""
        rows = self._targets[target]
        at_s = rows.at_s[rows.filled]
        return (float(at_s.min()), float(at_s.max())) if len(at_s) else (math.nan, math.nan)

    def clear(self) -> None:
        """Forget everything; the count of refused labels stays."""
        self._targets = {name: _Rows(self.caps) for name in self._targets}
        self._endpoints = {"": 0}

    def restore(self, target: TargetName, rows: Labelled) -> None:
        """Take in what ``arrays`` once gave. ValueError when it does not fit together."""
        n = len(rows.y_ms)
        if rows.X.shape != (n, len(f.FEATURES)) or len(rows.at_s) != n or len(rows.endpoint) != n:
            raise ValueError(f"{n} labels with {rows.X.shape} features, {len(rows.at_s)} times")
        whole = np.isfinite(rows.X).all() and np.isfinite(rows.y_ms).all() and np.isfinite(rows.at_s).all()
        if not whole or (rows.y_ms <= 0.0).any():
            raise ValueError("a label or feature is not a number")
        classes = rows.X[:, f.ENGINE_CLASS]
        if n and not (classes.min() >= 0.0 and classes.max() < f.MAX_CLASSES):
            raise ValueError("an engine class is out of range")
        if n and not (rows.endpoint.min() >= 0 and rows.endpoint.max() < len(rows.endpoints)):
            raise ValueError("a row names no endpoint")
        for x, y_ms, at_s, endpoint in zip(rows.X, rows.y_ms.tolist(), rows.at_s.tolist(), rows.endpoint, strict=True):
            self._targets[target].push(x, y_ms, at_s, self._endpoint(rows.endpoints[endpoint]))


def stratum(row: NDArray[np.float64]) -> int:
    """The stratum of one row: its class, how much waits, how much prefill is ahead, how much of it is cached."""
    waiting = int(np.searchsorted(_WAITING, row[f.WAITING], side="right"))
    prefill = int(np.searchsorted(_PREFILL, row[f.UNCACHED] + row[f.INFLIGHT_PREFILL], side="right"))
    cached = int(np.searchsorted(_CACHED_SHARE, row[f.PREFIX_MATCH], side="right"))
    within = (waiting * (len(_PREFILL) + 1) + prefill) * (len(_CACHED_SHARE) + 1) + cached
    return int(row[f.ENGINE_CLASS]) * STRATA_PER_CLASS + within


class _Rows:
    """The rows of one target in one block of memory; each stratum is a queue of places in it."""

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self.X = np.zeros((caps.total, len(f.FEATURES)))
        self.y_ms, self.at_s = np.zeros(caps.total), np.zeros(caps.total)
        self.endpoint = np.zeros(caps.total, dtype=np.int32)
        self.order = np.full(caps.total, -1, dtype=np.int64)  # the label's number in its stream; -1 = an empty place
        self.order_in_class = np.zeros(caps.total, dtype=np.int64)
        self.arrived = 0
        self.arrived_of_class = np.zeros(f.MAX_CLASSES, dtype=np.int64)
        self.per_class: Counter[int] = Counter()
        self._free = list(range(caps.total))
        self._queues: dict[int, deque[int]] = {}

    def __len__(self) -> int:
        return len(self.order) - len(self._free)

    @property
    def filled(self) -> NDArray[np.bool_]:
        return self.order >= 0

    def push(self, row: NDArray[np.float64], label_ms: float, at_s: float, endpoint: int) -> None:
        key = stratum(row)
        one = key // STRATA_PER_CLASS
        if len(self._queues.get(key, ())) >= self.caps.per_stratum:
            self._drop_oldest(key)
        elif self.per_class[one] >= self.caps.per_class:
            self._drop_oldest(self._largest(k for k in self._queues if k // STRATA_PER_CLASS == one))
        elif not self._free:
            self._drop_oldest(self._largest(self._queues))
        place = self._free.pop()
        self.X[place], self.y_ms[place], self.at_s[place] = row, label_ms, at_s
        self.endpoint[place], self.order[place] = endpoint, self.arrived
        self.order_in_class[place] = self.arrived_of_class[one]
        self._queues.setdefault(key, deque()).append(place)
        self.per_class[one] += 1
        self.arrived += 1
        self.arrived_of_class[one] += 1

    def _largest(self, keys: Iterable[int]) -> int:
        return max(keys, key=lambda k: len(self._queues[k]))

    def _drop_oldest(self, key: int) -> None:
        place = self._queues[key].popleft()
        self.order[place] = -1
        self._free.append(place)
        self.per_class[key // STRATA_PER_CLASS] -= 1

    def labelled(self, endpoints: tuple[str, ...]) -> Labelled:
        places = np.nonzero(self.filled)[0]
        places = places[np.argsort(self.order[places])]
        X = self.X[places]
        age = self.arrived_of_class[X[:, f.ENGINE_CLASS].astype(np.intp)] - 1 - self.order_in_class[places]
        return Labelled(X, self.y_ms[places], age, self.at_s[places], self.endpoint[places], endpoints)
