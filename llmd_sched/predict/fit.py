"""From a window of labelled rows to the next model, or to none when the next would be worse than the one in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import base
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.features import FEATURES, MONOTONE
from llmd_sched.predict.forest import Trees, no_trees, parse
from llmd_sched.predict.model import MAX_FACTOR, Model, Target, bounded
from llmd_sched.predict.window import Labelled, Window
from llmd_sched.types import Array


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to fit. The defaults were chosen on the recorded Qwen3-32B/H200 rows; all are flat around their value."""

    trees: int = 60
    leaves: int = 15
    rate: float = 0.08
    bins: int = 63
    rows_per_leaf: int = 20
    rows_before_trees: int = 60
    half_life_rows: float = 300.0
    least_weight: float = 0.02
    """A row of a regime that no longer occurs keeps this share of a new row's weight."""
    ridge_rows: float = 3.0
    """How many rows the preset's shape is worth."""
    least_held_out: int = 20
    most_held_out_share: float = 0.2
    tolerance: float = 0.1
    """How much worse than the model in use (relative, and in absolute log error) still passes for noise."""
    monotone: bool = False
    """Constrain the trees by ``features.MONOTONE``. LightGBM refuses constraints under its L1 loss, and with Huber's
    the TTFT error on the recorded rows rose by a tenth (light load) to 60 % (heavy load), so it is off: growth is
    the base's duty, and its coefficients are never negative."""


DEFAULT = Recipe()


class _Weighted(NamedTuple):
    """A part of the window with its weights."""

    X: NDArray[np.float64]
    y_ms: Array
    weight: Array

    def keep(self, mask: NDArray[np.bool_]) -> _Weighted:
        return _Weighted(self.X[mask], self.y_ms[mask], self.weight[mask])


class _Fitted(NamedTuple):
    """A base with at most ``len(steps)`` trees; booster None = the base alone."""

    coefficients: Array
    booster: Any

    def log_error(self, name: TargetName, part: _Weighted, trees: int) -> Array:
        """log(predicted / measured) of each row with only the first ``trees`` trees."""
        error = np.log(bounded(base.TERMS[name](part.X) @ self.coefficients) / part.y_ms)
        if trees and self.booster is not None:
            limit = np.log(MAX_FACTOR)
            error += np.clip(self.booster.predict(part.X, num_iteration=trees, num_threads=1), -limit, limit)
        return np.asarray(error)


def fit(
    window: Window, incumbent: Model | None, version: int, now_s: float, samples: int = 0, recipe: Recipe = DEFAULT
) -> Model | None:
    """The model after ``incumbent`` (None = the default preset), or None when neither target got better data.

    A target that fails the gate keeps the incumbent's fit: ``model.ttft is incumbent.ttft`` tells.
    """
    current = incumbent or Model.cold()
    ttft = fit_target("ttft", window.arrays("ttft"), current, recipe) or current.ttft
    tpot = fit_target("tpot", window.arrays("tpot"), current, recipe) or current.tpot
    if ttft is current.ttft and tpot is current.tpot:
        return None
    return Model(version, ttft, tpot, samples=samples, preset=current.preset, fitted_at_s=now_s)


def fit_target(name: TargetName, data: Labelled, current: Model, recipe: Recipe = DEFAULT) -> Target | None:
    """One target fitted to ``data``; None when there is nothing to learn or the gate refuses the result.

    Every fifth block of twenty rows and the newest rows are held out first: the newest, which the model in use has
    not seen either, decide whether the candidate passes; all of them decide how many trees are worth having. What
    passes is fitted again to all rows, the newest included.
    """
    rows, old = len(data.y_ms), current.target(name)
    if rows == 0 or (rows < recipe.rows_before_trees and rows < old.rows):
        return None
    weight = np.maximum(0.5 ** (data.age / recipe.half_life_rows), recipe.least_weight)
    part = _Weighted(data.X, data.y_ms, weight)
    prior = np.array(getattr(base.COLD_START[current.preset], name))
    if rows < recipe.rows_before_trees:
        coefficients = base.fit(base.TERMS[name](part.X), part.y_ms, weight, prior, recipe.ridge_rows)
        return Target(coefficients, no_trees(), rows=rows, newest_s=float(data.at_s[-1]))
    newest, held_out = _held_out(data.at_s, old.newest_s, recipe)
    trial = _fit_part(name, part.keep(~held_out), prior, recipe.trees, recipe)
    trees = _best_tree_count(name, trial, part.keep(held_out), recipe)
    news = part.keep(newest)
    error = trial.log_error(name, news, trees)
    if not _passes(error, np.log(_predict(name, current, news.X) / news.y_ms), recipe):
        return None
    final = _fit_part(name, part, prior, trees, recipe)
    return Target(
        final.coefficients,
        no_trees() if final.booster is None else _parse(final.booster),
        rows=rows,
        newest_s=float(data.at_s[-1]),
        held_out_error=float(np.median(np.abs(error))),
    )


def _held_out(at_s: Array, seen_until_s: float, recipe: Recipe) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(the newest rows, those and every fifth block of twenty) as masks over rows ordered oldest first.

    Blocks, because neighbours in time share their fate: single rows held out would be told by their neighbours.
    """
    rank = np.arange(len(at_s))[::-1]
    most = int(recipe.most_held_out_share * len(at_s))
    newest = rank < max(recipe.least_held_out, min(most, int((at_s > seen_until_s).sum())))
    return newest, newest | ((rank // 20) % 5 == 2)


def _fit_part(name: TargetName, part: _Weighted, prior: Array, trees: int, recipe: Recipe) -> _Fitted:
    terms = base.TERMS[name](part.X)
    coefficients = base.fit(terms, part.y_ms, part.weight, prior, recipe.ridge_rows)
    if not trees:
        return _Fitted(coefficients, None)
    residual = np.log(part.y_ms / bounded(terms @ coefficients))
    quiet = {"verbosity": -1, "num_threads": 1, "max_bin": recipe.bins}
    settings: dict[str, Any] = {
        **quiet,
        "objective": "regression_l1",
        "num_leaves": recipe.leaves,
        "learning_rate": recipe.rate,
        "min_data_in_leaf": min(recipe.rows_per_leaf, max(5, len(residual) // 5)),
        "force_col_wise": True,
        "seed": 1,
    }
    if recipe.monotone:
        settings |= {"objective": "huber", "alpha": 0.3, "monotone_constraints": list(MONOTONE[name])}
    rows = lgb.Dataset(part.X, residual, weight=part.weight, feature_name=list(FEATURES), params=quiet)
    return _Fitted(coefficients, lgb.train(settings, rows, trees))


def _best_tree_count(name: TargetName, trial: _Fitted, held_out: _Weighted, recipe: Recipe) -> int:
    """0, a quarter, half or all of the trees, whichever errs least; on noise alone, the base does best by itself."""
    choices = (recipe.trees, recipe.trees // 2, recipe.trees // 4, 0)
    errors = [np.average(np.abs(trial.log_error(name, held_out, trees)), weights=held_out.weight) for trees in choices]
    return choices[int(np.argmin(errors))]


def _passes(candidate: Array, incumbent: Array, recipe: Recipe) -> bool:
    """The candidate's mean percentage error and median absolute log error are no worse than the incumbent's."""
    slack = 1.0 + recipe.tolerance
    mean_new, mean_old = (float(np.abs(np.expm1(error)).mean()) for error in (candidate, incumbent))
    median_new, median_old = (float(np.median(np.abs(error))) for error in (candidate, incumbent))
    absolute = 0.1 * recipe.tolerance
    return mean_new <= mean_old * slack + absolute and median_new <= median_old * slack + absolute


def _predict(name: TargetName, model: Model, X: NDArray[np.float64]) -> Array:
    ttft_ms, tpot_ms = model.predict(X)
    return ttft_ms if name == "ttft" else tpot_ms


def _parse(booster: lgb.Booster) -> Trees:
    return parse(booster.model_to_string())
