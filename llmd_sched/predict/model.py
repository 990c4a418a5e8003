"""What is published: both targets' base and trees under one version, as a value that survives a trip through bytes."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmd_sched.errors import SchedError
from llmd_sched.predict import base, blob
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.features import ENGINE_CLASS, FEATURES, MAX_CLASSES
from llmd_sched.predict.forest import Forest, Trees, no_trees
from llmd_sched.types import Array

MIN_MS = 0.01
MAX_MS = 3_600_000.0
MAX_FACTOR = 20.0
"""The trees correct the base by at most this factor, up or down."""

_MAGIC = b"llmd-sched model 2\n"


class BadModel(SchedError):
    """The bytes are not a model this version can read."""


class Made(enum.StrEnum):
    """How a target came to be."""

    PRESET = "preset"
    USUAL = "usual"
    """Fitted as ever."""
    SHORT_MEMORY = "short memory"
    """After drift: fitted mostly to the newest rows."""
    OTHER_LEVEL = "other level"
    """After drift: the one before, times one number."""
    BASE_ALONE = "base alone"
    """After drift: the one before, without its trees."""


class Target(msgspec.Struct, frozen=True, eq=False):
    """One fitted target."""

    coefficients: NDArray[np.float64]
    """(1 + classes, terms) of ``base.TTFT_TERMS`` or ``base.TPOT_TERMS``, ms per unit: the pool's line first."""
    trees: Trees
    made: Made = Made.PRESET
    rows: int = 0
    """How many labelled rows it was fitted on."""
    newest_s: float = -np.inf
    """When the newest of them was taken: any later label is news to this fit."""
    held_out_error: float = np.nan
    """Median |log(predicted / measured)| on the held-out rows before they were learned; NaN when there were none."""
    held_out_quantiles: tuple[float, ...] = ()
    """log(measured / predicted) on the same rows at ``types.QUANTILES``; empty when there were none."""
    bias: dict[str, float] = {}
    """By endpoint identity: what it adds to the logarithm, for reasons its row does not show."""


class Model(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Predicts both targets for feature rows. Version 0 is a preset that has seen nothing."""

    version: int
    ttft: Target
    tpot: Target
    samples: int = 0
    """Samples its trainer had received when it was fitted."""
    preset: str = "default"
    fitted_at_s: float = 0.0
    classes: tuple[str, ...] = ("",)
    """Engine classes by their number in a row."""
    features: tuple[str, ...] = FEATURES

    def __post_init__(self) -> None:
        for target, terms in ((self.ttft, base.TTFT_TERMS), (self.tpot, base.TPOT_TERMS)):
            shape = target.coefficients.shape
            if len(shape) != 2 or shape[0] < 1 or shape[1] != len(terms):
                raise ValueError(f"the base has the terms {', '.join(terms)}; got {shape}")

    @cached_property
    def forest(self) -> Forest:
        """Both targets' trees as the kernel's tables, TTFT first. ValueError when they do not fit a row."""
        return Forest([self.ttft.trees, self.tpot.trees], len(self.features))

    @classmethod
    def cold(cls, preset: str = "default") -> Model:
        """The preset's base alone. KeyError for a name that is not in ``base.COLD_START``."""
        start = base.COLD_START[preset]
        ttft, tpot = (Target(np.array([coefficients]), no_trees()) for coefficients in (start.ttft, start.tpot))
        return cls(version=0, ttft=ttft, tpot=tpot, preset=preset)

    def target(self, name: TargetName) -> Target:
        return self.ttft if name == "ttft" else self.tpot

    def predict(self, rows: NDArray[np.float64], log_bias: NDArray[np.float64] | None = None) -> tuple[Array, Array]:
        """(ttft_ms, tpot_ms), each (n,), for feature rows (n, F); always finite and at least MIN_MS.

        ``log_bias`` (2, n), TTFT first, is ``bias`` of the rows' endpoints.
        """
        log_factors = self.forest.predict(rows)
        bias = np.zeros_like(log_factors) if log_bias is None else log_bias
        engine_class = rows[:, ENGINE_CLASS]
        ttft_base_ms = base.base_ms(base.ttft_terms(rows), self.ttft.coefficients, engine_class)
        tpot_base_ms = base.base_ms(base.tpot_terms(rows), self.tpot.coefficients, engine_class)
        ttft_ms = _corrected(ttft_base_ms, log_factors[0], bias[0])
        tpot_ms = _corrected(tpot_base_ms, log_factors[1], bias[1])
        return ttft_ms, tpot_ms

    def bias(self, endpoints: Sequence[str]) -> NDArray[np.float64]:
        """What each endpoint adds to the logarithm of its predictions, (2, n), TTFT first; 0 for one not known."""
        return np.array([[target.bias.get(name, 0.0) for name in endpoints] for target in (self.ttft, self.tpot)])

    def to_bytes(self) -> bytes:
        """Self-describing and checksummed; read by ``from_bytes``."""
        return blob.seal(_MAGIC, self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Model:
        """BadModel for bytes that are foreign, damaged, or of a model with other features."""
        try:
            model = blob.unseal(_MAGIC, data, cls)
        except ValueError as error:
            raise BadModel(f"not a model of this format: {error}") from error
        model.check()
        return model

    def check(self) -> None:
        """BadModel when it does not fit a row; otherwise the forest is ready from here on."""
        if self.features != FEATURES:
            raise BadModel(f"the model was trained on the features {', '.join(self.features)}")
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise BadModel(f"the model knows {len(self.classes)} engine classes; 1 to {MAX_CLASSES} fit a row")
        try:
            _ = self.forest
        except ValueError as error:
            raise BadModel(f"the model cannot be used: {error}") from error


_LOG_LIMIT = float(np.log(MAX_FACTOR))


@njit(cache=True, nogil=True)
def _corrected(base_ms: Any, log_factor: Any, log_bias: Any) -> Any:
    """The base times what the trees and the bias say of it, each within its bounds: ``bounded`` row by row."""
    out = np.empty(base_ms.shape[0])
    for i in range(base_ms.shape[0]):
        value_ms = base_ms[i] if base_ms[i] <= MAX_MS else MAX_MS  # not (NaN <= MAX_MS)
        factor = min(max(log_factor[i], -_LOG_LIMIT), _LOG_LIMIT) + log_bias[i]
        out[i] = min(max(max(value_ms, MIN_MS) * np.exp(factor), MIN_MS), MAX_MS)
    return out


def bounded(value_ms: Array) -> Array:
    """``value_ms`` between MIN_MS and MAX_MS, NaN as MAX_MS: an unknown wait is not a short one."""
    return np.fmax(np.fmin(value_ms, MAX_MS), MIN_MS)  # fmin and fmax pass over NaN
