"""Which fit serves next: candidates are judged on rows they have not seen, against the model in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import base
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.fit import DEFAULT, Fitted, Recipe, endpoint_bias, fit_part, no_bias, part_of
from llmd_sched.predict.forest import no_trees, parse
from llmd_sched.predict.model import Made, Model, Target
from llmd_sched.predict.window import Labelled, Window
from llmd_sched.types import QUANTILES, Array

SHORT_MEMORY = 0.1
"""After drift, a second candidate is fitted whose half-life is this share of the first's."""


def next_model(
    window: Window,
    incumbent: Model | None,
    version: int,
    now_s: float,
    samples: int = 0,
    recipe: Recipe = DEFAULT,
    *,
    drifted: frozenset[TargetName] = frozenset(),
    classes: tuple[str, ...] = ("",),
) -> Model | None:
    """The model after ``incumbent`` (None = the default preset), or None when neither target got better data.

    A target that fails the gate keeps the incumbent's fit: ``model.ttft is incumbent.ttft`` tells. For a target that
    drifted, a fit with a short memory, the incumbent at another level and its base alone compete too.
    """
    current = incumbent or Model.cold()
    ttft, tpot = (
        next_target(name, window.arrays(name), current, recipe, drifted=name in drifted) or current.target(name)
        for name in get_args(TargetName)
    )
    if ttft is current.ttft and tpot is current.tpot:
        return None
    return Model(version, ttft, tpot, samples=samples, preset=current.preset, fitted_at_s=now_s, classes=classes)


def next_target(
    name: TargetName, data: Labelled, current: Model, recipe: Recipe = DEFAULT, *, drifted: bool = False
) -> Target | None:
    """One target fitted to ``data``; None when there is nothing to learn or the gate refuses every candidate.

    Every fifth block of twenty rows and the newest rows are held out first: the newest, which the model in use has
    not seen either, decide whether a candidate passes; all of them decide how many trees are worth having. A fit that
    passes is made again of all rows, the newest included.
    """
    rows, old = len(data.y_ms), current.target(name)
    if rows == 0 or (rows < recipe.rows_before_trees and rows < old.rows):
        return None
    prior = np.array(getattr(base.COLD_START[current.preset], name))
    if rows < recipe.rows_before_trees:
        return _target(
            data, fit_part(name, part_of(data, recipe), prior, 0, recipe), 0, no_bias(data), Made.USUAL, None
        )
    held = _held_out(data.at_s, old.newest_s, recipe, every_other=drifted)
    in_use = _in_use(name, data, current)
    # After drift, too, the usual fit has to foresee what is new without having seen half of it: whatever tells one
    # minute from another would pass for a cause.
    candidates = [_fresh(name, data, held, ~(held.all | held.unseen), prior, recipe, Made.USUAL)]
    if drifted:
        short = replace(recipe, half_life_rows=SHORT_MEMORY * recipe.half_life_rows)
        candidates.append(_fresh(name, data, held, ~held.all, prior, short, Made.SHORT_MEMORY))
        candidates.append(_other_level(old, data, held, in_use))
        if len(old.trees.first_leaf):
            candidates.append(_base_alone(name, old, data, held))
    return _choose([(one, one.error[held.newest]) for one in candidates], in_use[held.newest], recipe)


def _choose(judged: list[tuple[_Candidate, Array]], in_use: Array, recipe: Recipe) -> Target | None:
    """The usual fit, which comes first, unless it is worse; then whichever else there is that does best.

    Without rivals, worse means by more than noise explains. With rivals the target has drifted: then the usual fit
    must err no more than the model in use, and not clearly more than its best rival; what has gone wrong once shall
    not again by a mere draw.
    """
    (usual, error), *rivals = judged
    if not rivals:
        return usual.finish() if _excess(error, in_use) <= recipe.noise_errors else None
    best, least = min(rivals, key=lambda rival: float(_percent(rival[1]).mean()))
    if _excess(error, in_use) <= 0.0 and _excess(error, least) <= recipe.noise_errors:
        return usual.finish()
    return best.finish() if _excess(least, in_use) <= 0.0 else None


class _HeldOut(NamedTuple):
    """Masks over rows ordered oldest first."""

    newest: NDArray[np.bool_]
    """Held out and not seen by the model in use."""
    all: NDArray[np.bool_]
    unseen: NDArray[np.bool_]
    """Not seen by the model in use, held out or not."""


def _held_out(at_s: Array, seen_until_s: float, recipe: Recipe, *, every_other: bool) -> _HeldOut:
    """The newest rows, and every fifth block of twenty.

    Blocks, because neighbours in time share their fate: single rows held out would be told by their neighbours. Only
    after drift (``every_other``) is that just what is wanted: what is new is all there is to learn from.
    """
    rank = np.arange(len(at_s))[::-1]
    most = int(recipe.most_held_out_share * len(at_s))
    unseen = rank < max(recipe.least_held_out, min(most, int((at_s > seen_until_s).sum())))
    newest = unseen & (rank % 2 == 0) if every_other else unseen
    return _HeldOut(newest, newest | (((rank // 20) % 5 == 2) & ~unseen), unseen)


class _Candidate(NamedTuple):
    error: Array
    """log(predicted / measured) of every row (n,), by a fit that has not seen the held-out ones."""
    finish: Callable[[], Target]
    """The target as it would serve."""


def _fresh(
    name: TargetName,
    data: Labelled,
    held: _HeldOut,
    seen_rows: NDArray[np.bool_],
    prior: Array,
    recipe: Recipe,
    made: Made,
) -> _Candidate:
    """Base and trees from the preset up, tried on ``seen_rows`` alone."""
    part = part_of(data, recipe)
    seen = part.keep(seen_rows)
    fitted = fit_part(name, seen, prior, recipe.trees, recipe)
    bias = endpoint_bias(fitted.log_error(name, seen, recipe.trees), seen, data, recipe)
    choices = (recipe.trees, recipe.trees // 2, recipe.trees // 4, 0)
    errors = [fitted.log_error(name, part, trees) + bias[part.endpoint] for trees in choices]
    costs = [np.average(np.abs(error[held.all]), weights=part.weight[held.all]) for error in errors]
    best = int(np.argmin(costs))  # on noise alone, the base does best by itself
    trees, error = choices[best], errors[best]

    def finish() -> Target:
        final = fit_part(name, part.without(bias), prior, trees, recipe)
        whole_bias = endpoint_bias(final.log_error(name, part, trees), part, data, recipe)
        return _target(data, final, trees, whole_bias, made, error[held.all])

    return _Candidate(error, finish)


def _other_level(old: Target, data: Labelled, held: _HeldOut, in_use: Array) -> _Candidate:
    """The target in use times one number: what a few dozen rows can tell of a pool that became slower or faster."""
    level = float(np.median(in_use[held.unseen & ~held.newest]))

    def finish() -> Target:
        whole_level = float(np.median(in_use[held.unseen]))
        judged = _judged(data, Made.OTHER_LEVEL, in_use[held.newest] - level)
        return msgspec.structs.replace(old, coefficients=old.coefficients * np.exp(-whole_level), **judged)

    return _Candidate(in_use - level, finish)


def _base_alone(name: TargetName, old: Target, data: Labelled, held: _HeldOut) -> _Candidate:
    """The target in use without its trees."""
    alone, part = Fitted(old.coefficients, None), part_of(data, DEFAULT)
    error = alone.log_error(name, part, 0) + _log_bias(old, data)[data.endpoint]
    judged = _judged(data, Made.BASE_ALONE, error[held.newest])
    return _Candidate(error, lambda: msgspec.structs.replace(old, trees=no_trees(), **judged))


def _in_use(name: TargetName, data: Labelled, current: Model) -> Array:
    """log(predicted / measured) of every row by the model in use."""
    bias = _log_bias(current.target(name), data)[data.endpoint]
    ttft_ms, tpot_ms = current.predict(data.X, np.vstack([bias, bias]))
    return np.asarray(np.log((ttft_ms if name == "ttft" else tpot_ms) / data.y_ms))


def _log_bias(target: Target, data: Labelled) -> Array:
    return np.array([target.bias.get(name, 0.0) for name in data.endpoints])


def _percent(error: Array) -> Array:
    """Absolute percentage errors as fractions, each at most 2: a stall nobody foresaw decides nothing."""
    return np.minimum(np.abs(np.expm1(error)), 2.0)


def _excess(one: Array, other: Array) -> float:
    """How much more one errs than the other on the same rows, in standard errors of the difference."""
    more = _percent(one) - _percent(other)
    noise = more.std() / np.sqrt(len(more))
    return float(more.mean() / max(noise, 1e-9))


def _target(
    data: Labelled, fitted: Fitted, trees: int, bias: Array, made: Made, held_out_error: Array | None
) -> Target:
    return Target(
        fitted.coefficients,
        no_trees() if fitted.booster is None else parse(fitted.booster.model_to_string(num_iteration=trees)),
        bias={data.endpoints[i]: float(bias[i]) for i in np.flatnonzero(bias)},
        **_judged(data, made, held_out_error),
    )


def _judged(data: Labelled, made: Made, held_out_error: Array | None) -> dict[str, Any]:
    """What a target says of its own making."""
    facts: dict[str, Any] = {"made": made, "rows": len(data.y_ms), "newest_s": float(data.at_s[-1])}
    if held_out_error is not None:
        facts["held_out_error"] = float(np.median(np.abs(held_out_error)))
        facts["held_out_quantiles"] = tuple(np.quantile(-held_out_error, QUANTILES).tolist())
    return facts
