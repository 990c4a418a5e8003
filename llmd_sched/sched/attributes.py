"""Custom metrics of the engines, as ``core-metrics-extractor`` reads them, to score and to filter by.

An attribute is the column ``attributeKey/producer``. It is NaN where nothing is known, and absent until an engine
had it for the first time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.plugin import Filter, Scorer
from llmd_sched.types import Array, Candidates, Request

DEFAULT_EXTRACTOR = "core-metrics-extractor"

LOWER, HIGHER = "linear_lower_is_better", "linear_higher_is_better"
PASS, FAIL = "Pass", "Fail"
THRESHOLD = "threshold"

OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "LessThan": operator.lt,
        "LessThanOrEqual": operator.le,
        "GreaterThan": operator.gt,
        "GreaterThanOrEqual": operator.ge,
        "Equal": operator.eq,
        "NotEqual": operator.ne,
    }
)


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of what stands inside the parameters."""


def _values(candidates: Candidates, attribute: str, producer: str) -> Array:
    values = candidates.get(f"{attribute}/{producer}")
    return np.full(len(candidates), np.nan) if values is None else values


def _check_attribute(field: str, attribute: str, producer: str) -> None:
    if not attribute or "/" in attribute:
        raise ValueError(f"{field} {attribute!r}: expected a name without '/'; producer names who makes it")
    if not producer or "/" in producer:
        raise ValueError(f"producer {producer!r}: expected the name of the extractor that reads {attribute}")


class FixedRange(_Strict, frozen=True):
    """Values are clamped to it."""

    min: float
    max: float


class AdaptiveRange(_Strict, frozen=True):
    """From the least to the most among the candidates."""


class Normalization(_Strict, frozen=True):
    """``adaptiveRange`` unless ``fixedRange`` is given."""

    fixed_range: FixedRange | None = None
    adaptive_range: AdaptiveRange | None = None

    def check(self) -> None:
        """Raises ValueError with what is accepted."""
        if self.fixed_range is not None and self.adaptive_range is not None:
            raise ValueError("normalization takes fixedRange or adaptiveRange, not both")
        if self.fixed_range is not None and not -math.inf < self.fixed_range.min < self.fixed_range.max < math.inf:
            raise ValueError("fixedRange needs a finite min below a finite max")


class Scoring(_Strict, frozen=True):
    """How a value becomes a score."""

    type: str
    normalization: Normalization = Normalization()


class EndpointAttributeScorer(Scorer, frozen=True):
    """A custom metric, linear in its range.

    ``algorithm.type`` linear_lower_is_better or linear_higher_is_better; ``algorithm.normalization`` fixedRange
    {min, max}, to which values are clamped, or adaptiveRange, that of the candidates' values. An endpoint without the
    metric scores 0; all equal in an adaptive range score 1. ``attributeKey`` is the metric's key at the extractor
    named in ``producer``.
    """

    attribute_key: str
    algorithm: Scoring
    producer: str = DEFAULT_EXTRACTOR

    def check(self) -> None:
        _check_attribute("attributeKey", self.attribute_key, self.producer)
        if self.algorithm.type not in (LOWER, HIGHER):
            raise ValueError(f"algorithm.type {self.algorithm.type!r}: accepted are {LOWER} and {HIGHER}")
        self.algorithm.normalization.check()

    def score(self, request: Request, candidates: Candidates) -> Array:
        values = _values(candidates, self.attribute_key, self.producer)
        known = np.isfinite(values)
        scores = np.zeros(len(values))
        if known.any():
            scores[known] = self._linear(values[known])
        return scores

    def _linear(self, values: Array) -> Array:
        fixed = self.algorithm.normalization.fixed_range
        low, high = (fixed.min, fixed.max) if fixed else (values.min(), values.max())
        if low == high:
            return np.ones(len(values))
        share = (np.clip(values, low, high) - low) / (high - low)
        return 1.0 - share if self.algorithm.type == LOWER else share


class Threshold(_Strict, frozen=True):
    """``value(endpoint) operator value`` must hold."""

    operator: str
    value: float


class Keeping(_Strict, frozen=True):
    """Which values are kept."""

    type: str
    threshold: Threshold | None = None


class EndpointAttributeFilter(Filter, frozen=True):
    """Keep the endpoints whose custom metric compares with a value as asked.

    ``algorithm.type`` threshold, with ``algorithm.threshold`` {operator, value}: LessThan, LessThanOrEqual,
    GreaterThan, GreaterThanOrEqual, Equal or NotEqual. ``onMissing``: endpoints without the metric Pass or Fail. With
    ``fallbackOnEmpty`` everything stays when nothing would; without, the request ends with 429. ``attribute`` is the
    metric's key at the extractor named in ``producer``.
    """

    attribute: str
    algorithm: Keeping
    producer: str = DEFAULT_EXTRACTOR
    on_missing: str = PASS
    fallback_on_empty: bool = False

    def check(self) -> None:
        _check_attribute("attribute", self.attribute, self.producer)
        if self.on_missing not in (PASS, FAIL):
            raise ValueError(f"onMissing {self.on_missing!r}: accepted are {PASS} and {FAIL}")
        if self.algorithm.type != THRESHOLD:
            raise ValueError(f"algorithm.type {self.algorithm.type!r}: accepted is {THRESHOLD}")
        threshold = self.algorithm.threshold
        if threshold is None or threshold.operator not in OPERATORS or not math.isfinite(threshold.value):
            known = ", ".join(OPERATORS)
            raise ValueError(f"algorithm.threshold needs a finite value and an operator; operators are {known}")

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        threshold = self.algorithm.threshold
        assert threshold is not None  # ``check`` let no other pass
        values = _values(candidates, self.attribute, self.producer)
        known = np.isfinite(values)
        kept = np.full(len(values), self.on_missing == PASS)
        kept[known] = OPERATORS[threshold.operator](values[known], threshold.value)
        return ~kept if self.fallback_on_empty and not kept.any() else kept
