"""Which latency objectives are at stake on each endpoint, and how many of them one more request would cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict.price import Prices
from llmd_sched.types import Array, Endpoint, Request

SPREAD = 0.05
"""Of a prediction, as a share of it: this far from the limit the odds are e : 1. TPOT at steady load errs by that."""
_NONE: Mapping[Any, float] = {}
LEVELS_PER_OCTAVE = 16
"""Limits are kept this finely, so that a client for each millisecond does not make a decision slow."""


class RunningSlos:
    """The TPOT objectives of the requests on each endpoint, by ticket."""

    def __init__(self) -> None:
        self._endpoint_of: dict[str, str] = {}
        self._limits: dict[str, dict[str, float]] = {}
        self._levels: dict[str, Counter[float]] = {}

    def __len__(self) -> int:
        return len(self._endpoint_of)

    def add(self, ticket: str, endpoint: str, tpot_slo_ms: float) -> None:
        """Of a ticket that is not there yet. ValueError unless the limit is above 0."""
        level = _level_ms(tpot_slo_ms)
        self._endpoint_of[ticket] = endpoint
        self._limits.setdefault(endpoint, {})[ticket] = tpot_slo_ms
        self._levels.setdefault(endpoint, Counter())[level] += 1

    def remove(self, ticket: str) -> None:
        """Nothing happens when it is not there."""
        endpoint = self._endpoint_of.pop(ticket, None)
        if endpoint is None:
            return
        limits, levels = self._limits[endpoint], self._levels[endpoint]
        levels[_level_ms(limits.pop(ticket))] -= 1
        if not limits:
            del self._limits[endpoint], self._levels[endpoint]

    def leave(self, present: Sequence[Endpoint]) -> None:
        """Of endpoints that are not ``present`` any more nothing is kept; they may come back as another engine."""
        for key in self._limits.keys() - {e.key for e in present}:
            for ticket in list(self._limits[key]):
                self.remove(ticket)

    def tightest_ms(self, endpoints: Sequence[Endpoint]) -> Array:
        """(n,), infinite where there is none."""
        return np.array([min(self._limits.get(e.key, _NONE).values(), default=math.inf) for e in endpoints])

    def counts(self, endpoints: Sequence[Endpoint]) -> tuple[Array, NDArray[np.float64]]:
        """Limits (levels,) and how many requests with each are on each endpoint (levels, n)."""
        there = [self._levels.get(e.key, _NONE) for e in endpoints]
        levels = sorted(set().union(*there))
        table = [[counts.get(level, 0.0) for counts in there] for level in levels]
        return np.array(levels), np.array(table, dtype=np.float64).reshape(len(levels), len(endpoints))


def losses(
    request: Request,
    ttft_ms: Array,
    tpot_ms: Array,
    prices: Prices,
    output_tokens: Array,
    running: tuple[Array, NDArray[np.float64]],
) -> Array:
    """Objectives that will be missed if the request goes there and would not be otherwise, its own included: (n,).

    Where all are lost already, one more request costs none; so requests without objectives gather where others could
    not keep theirs anyway, and leave the rest of the pool to those that can.
    """
    limits, counts = running
    before = _missed(tpot_ms - prices.slowdown_ms, limits)
    after = _missed(tpot_ms + prices.prefill_ms / np.maximum(output_tokens, 1.0), limits)
    others: Array = (counts * (after - before)).sum(axis=0)
    kept = np.ones(len(tpot_ms))
    for predicted_ms, limit_ms in ((ttft_ms, request.ttft_slo_ms), (tpot_ms, request.tpot_slo_ms)):
        if limit_ms is not None:
            kept *= 1.0 - _missed(predicted_ms, np.array([limit_ms]))[0]
    return others + 1.0 - kept


def _missed(predicted_ms: Array, limits_ms: Array) -> NDArray[np.float64]:
    """The odds of each limit (levels, n): a logistic curve, as the error of a prediction is about log-normal."""
    distance = np.log(np.maximum(predicted_ms, 1e-3) / np.maximum(limits_ms[:, None], 1e-3)) / SPREAD
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * distance))


def _level_ms(limit_ms: float) -> float:
    if not limit_ms > 0:
        raise ValueError(f"a limit must be above 0, not {limit_ms}")
    return float(2.0 ** (round(math.log2(limit_ms) * LEVELS_PER_OCTAVE) / LEVELS_PER_OCTAVE))
