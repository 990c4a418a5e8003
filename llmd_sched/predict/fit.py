"""Labelled rows to a base, trees and the biases of endpoints. Whether the result may serve is ``gate``'s question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import base
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.features import CATEGORICAL, ENGINE_CLASS, FEATURES, IGNORED, MONOTONE
from llmd_sched.predict.model import MAX_FACTOR, bounded
from llmd_sched.predict.window import Labelled
from llmd_sched.types import Array


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to fit: one set of numbers for every trace and target. All are flat around their value."""

    trees: int = 60
    leaves: int = 8
    rate: float = 0.08
    bins: int = 63
    rows_per_leaf: int = 20
    leaf_ridge: float = 1.0
    features_per_tree: float = 0.7
    loss_width: float = 0.15
    """Log errors beyond it count by their size, not its square (pseudo-Huber): a stall is one bad row."""
    rows_before_trees: int = 60
    half_life_rows: float = 450.0
    least_weight: float = 0.02
    """A row of a regime that no longer occurs keeps this share of a new row's weight."""
    ridge_rows: float = 10.0
    """How many rows the preset's shape is worth."""
    percent_weights: tuple[float, float] = (0.2, 2.0)
    """Bounds of the weight base/measured, by which an absolute log error costs what the percentage does."""
    bias_rows: float = 20.0
    """How many rows it takes to believe half of what one endpoint shows."""
    least_bias: float = 0.03
    """A smaller log bias of an endpoint is noise."""
    least_held_out: int = 20
    most_held_out_share: float = 0.2
    noise_errors: float = 2.0
    """A candidate that errs more than the model in use, by more standard errors of the difference, is refused. With
    0 (it must err less, noise or not) half of all fits are refused for nothing and the recorded traces err by up to a
    tenth more."""


DEFAULT = Recipe()


class Part(NamedTuple):
    """Part of a window with its weights."""

    X: NDArray[np.float64]
    y_ms: Array
    weight: Array
    endpoint: NDArray[np.int32]

    @property
    def engine_class(self) -> NDArray[np.int64]:
        return self.X[:, ENGINE_CLASS].astype(np.int64)

    def keep(self, mask: NDArray[np.bool_]) -> Part:
        return Part(self.X[mask], self.y_ms[mask], self.weight[mask], self.endpoint[mask])

    def without(self, bias: Array) -> Part:
        """As if every endpoint were of its class's average."""
        return self._replace(y_ms=self.y_ms * np.exp(-bias[self.endpoint]))


class Fitted(NamedTuple):
    """A base with at most ``recipe.trees`` trees; booster None = the base alone."""

    coefficients: NDArray[np.float64]
    booster: Any

    def log_error(self, name: TargetName, part: Part, trees: int) -> Array:
        """log(predicted / measured) of each row with only the first ``trees`` trees."""
        base_ms = bounded(base.base_ms(base.TERMS[name](part.X), self.coefficients, part.X[:, ENGINE_CLASS]))
        error = np.log(base_ms / part.y_ms)
        if trees and self.booster is not None:
            limit = np.log(MAX_FACTOR)
            error += np.clip(self.booster.predict(part.X, num_iteration=trees, num_threads=1), -limit, limit)
        return np.asarray(error)


def part_of(data: Labelled, recipe: Recipe) -> Part:
    weight = np.maximum(0.5 ** (data.age / recipe.half_life_rows), recipe.least_weight)
    return Part(data.X, data.y_ms, weight, data.endpoint)


def fit_part(name: TargetName, part: Part, prior: Array, trees: int, recipe: Recipe) -> Fitted:
    terms = base.TERMS[name](part.X)
    coefficients = base.fit_classes(terms, part.y_ms, part.weight, part.engine_class, prior, recipe.ridge_rows)
    rows_per_leaf = min(recipe.rows_per_leaf, max(5, len(part.y_ms) // 5))
    if not trees or not _can_be_split(part.X, rows_per_leaf):
        return Fitted(coefficients, None)
    base_ms = bounded(base.base_ms(terms, coefficients, part.X[:, ENGINE_CLASS]))
    residual = np.log(part.y_ms / base_ms)
    weight = part.weight * np.clip(base_ms / part.y_ms, *recipe.percent_weights)
    quiet = {"verbosity": -1, "num_threads": 1, "max_bin": recipe.bins}
    settings: dict[str, Any] = {
        **quiet,
        "objective": _pseudo_huber(recipe.loss_width, residual, weight),
        "monotone_constraints": list(MONOTONE[name]),
        "feature_contri": [float(i not in IGNORED[name]) for i in range(len(FEATURES))],
        "num_leaves": recipe.leaves,
        "learning_rate": recipe.rate,
        "lambda_l2": recipe.leaf_ridge,
        "feature_fraction": recipe.features_per_tree,
        "min_data_in_leaf": rows_per_leaf,
        "min_data_per_group": recipe.rows_per_leaf,
        "force_col_wise": True,
        "seed": 1,
    }
    rows = lgb.Dataset(
        part.X,
        residual,
        weight=weight,
        feature_name=list(FEATURES),
        categorical_feature=list(CATEGORICAL),
        params=quiet,
    )
    return Fitted(coefficients, lgb.train(settings, rows, trees))


def _can_be_split(X: NDArray[np.float64], rows_per_leaf: int) -> bool:
    """Whether any feature has two values of so many rows each; LightGBM refuses rows that are all alike."""
    ordered = np.sort(X, axis=0)
    return bool((ordered[rows_per_leaf - 1] < ordered[-rows_per_leaf]).any())


def _pseudo_huber(width: float, label: Array, weight: Array) -> Callable[[Array, object], tuple[Array, Array]]:
    """Charbonnier's loss, width^2 (sqrt(1 + (e / width)^2) - 1), as gradient and curvature.

    LightGBM's own absolute losses refuse monotone constraints, and its Huber loss steps by the mean. The curvature is
    kept above 0.2, or far rows would leap.
    """

    def derivatives(predicted: Array, _rows: object) -> tuple[Array, Array]:
        error = predicted - label
        slope = 1.0 / np.sqrt(1.0 + (error / width) ** 2)
        return weight * error * slope, weight * np.maximum(slope**3, 0.2)

    return derivatives


def endpoint_bias(error: Array, part: Part, data: Labelled, recipe: Recipe) -> Array:
    """What each endpoint adds to the logarithm, (endpoints,): the weighted median of what the fit leaves of its rows,
    shrunk towards 0 for want of rows. An endpoint alone in the pool has none; it is the pool."""
    bias = no_bias(data)
    known = np.unique(part.endpoint[part.endpoint > 0])
    if len(known) < 2:
        return bias
    for one in known:
        own = part.endpoint == one
        rows = part.weight[own].sum()
        value = -_weighted_median(error[own], part.weight[own]) * rows / (rows + recipe.bias_rows)
        bias[one] = value if abs(value) >= recipe.least_bias else 0.0
    return bias


def _weighted_median(values: Array, weight: Array) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(reached, 0.5 * reached[-1])])


def no_bias(data: Labelled) -> Array:
    return np.zeros(len(data.endpoints))
