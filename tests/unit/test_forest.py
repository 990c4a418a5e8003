from collections.abc import Callable
from functools import cache
from typing import Any

import lightgbm as lgb
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmd_sched.predict.forest import Forest, Trees, UnsupportedForest, no_trees, parse

QUIET = {"verbosity": -1, "num_threads": 1, "min_data_in_leaf": 5}
CLASS = 3
"""The column of ``table`` that may be categorical."""
NEARLY_ZERO = [0.0, 5e-324, 1e-36, 1.0000000180025095e-35, 1.0000000180025097e-35, 1e-34]
ODD_CLASSES = [np.nan, -np.inf, -1.0, -0.5, 0.4, 1.0, 2.7, 40.0, 62.0, 63.0, 63.9, 64.0, 1e10, 1e300, np.inf]


def train(
    X: NDArray[np.float64], y: NDArray[np.float64], trees: int = 10, categorical: tuple[int, ...] = (), **params: Any
) -> lgb.Booster:
    both = {**QUIET, **params}
    data = lgb.Dataset(X, y, params=both, categorical_feature=list(categorical))
    return lgb.train({"objective": "regression", **both}, data, trees)


def forest_of(*boosters: lgb.Booster, features: int = 4) -> Forest:
    return Forest([parse(booster.model_to_string()) for booster in boosters], features)


def table(rng: np.random.Generator, count: int, missing: float = 0.0, zeros: float = 0.0) -> NDArray[np.float64]:
    X = rng.normal(size=(count, 4)) * [1.0, 100.0, 1e-3, 5.0]
    X[rng.random(X.shape) < zeros] = 0.0
    X[rng.random(X.shape) < missing] = np.nan
    return X


def with_classes(X: NDArray[np.float64], rng: np.random.Generator, classes: int) -> NDArray[np.float64]:
    """``X`` with the numbers of classes for its class column, missing where they were."""
    X[:, CLASS] = np.where(np.isnan(X[:, CLASS]), np.nan, rng.integers(0, classes, len(X)))
    return X


def law(X: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.nan_to_num(X)
    uneven = np.sin(37.0 * known[:, CLASS])  # classes in no order
    return known[:, 0] + 1e-4 * known[:, 1] ** 2 - 1000.0 * known[:, 2] + 3.0 * np.isnan(X[:, 3]) + 2.0 * uneven


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    leaves=st.sampled_from([2, 3, 15, 31, 32, 33, 64]),
    objective=st.sampled_from(["regression", "regression_l1", "huber", "quantile"]),
    classes=st.sampled_from([0, 2, 10, 40, 64]),
    one_hot=st.booleans(),
    missing=st.sampled_from([0.0, 0.2]),
    zeros=st.sampled_from([0.0, 0.3]),
    zero_as_missing=st.booleans(),
    use_missing=st.booleans(),
    blank=st.booleans(),
    monotone=st.sampled_from(["", "basic", "intermediate", "advanced"]),
)
def test_the_kernel_says_what_the_booster_says(
    seed: int,
    leaves: int,
    objective: str,
    classes: int,
    one_hot: bool,
    missing: float,
    zeros: float,
    zero_as_missing: bool,
    use_missing: bool,
    blank: bool,
    monotone: str,
) -> None:
    rng = np.random.default_rng(seed)
    X = table(rng, 400, missing, zeros)
    if classes:
        X = with_classes(X, rng, classes)
    if blank:
        X[:, 2] = np.nan
    params: dict[str, Any] = {
        "objective": objective,
        "num_leaves": leaves,
        "zero_as_missing": zero_as_missing,
        "use_missing": use_missing,
        "max_cat_to_onehot": 64 if one_hot else 1,
        "min_data_per_group": 1,
        "cat_smooth": 1.0,
    }
    if monotone and objective in ("regression", "huber"):
        params |= {"monotone_constraints": [1, 0, -1, 0], "monotone_constraints_method": monotone}
    booster = train(X, law(X), categorical=(CLASS,) if classes else (), **params)
    seen = table(rng, 200, 0.2, 0.2)
    seen[:100, CLASS] = rng.choice(ODD_CLASSES, 100)
    seen[100:150, CLASS] = rng.integers(-2, 70, 50)
    seen[150:160] = rng.choice([np.inf, -np.inf, 1e300, -1e300], (10, 4))
    seen[160:180] = rng.choice([*NEARLY_ZERO, *np.negative(NEARLY_ZERO)], (20, 4))
    thresholds = parse(booster.model_to_string()).numeric.threshold
    if len(thresholds):  # a value exactly on a threshold goes left
        seen[:50, 0] = rng.choice(thresholds, 50)
    scores = forest_of(booster).predict(seen)
    np.testing.assert_allclose(scores[0], booster.predict(seen, raw_score=True), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tiny", [*NEARLY_ZERO, *np.negative(NEARLY_ZERO)])
def test_what_lightgbm_reads_as_zero_is_zero(tiny: float) -> None:
    X = table(np.random.default_rng(0), 300, 0.2, 0.3)
    booster = train(X, law(X), objective="regression_l1", num_leaves=15, use_missing=False)
    seen = np.full((1, 4), tiny)
    np.testing.assert_allclose(forest_of(booster).predict(seen)[0], booster.predict(seen), rtol=0, atol=1e-9)


def by_class(rng: np.random.Generator, classes: list[int], **params: Any) -> lgb.Booster:
    """Trained on nothing but a class, whose every number means something else."""
    X = rng.choice(classes, (1000, 1)).astype(float)
    loose = {"min_data_per_group": 1, "cat_smooth": 0.0, "max_cat_to_onehot": 1, **params}
    return train(X, rng.normal(size=max(classes) + 1)[X[:, 0].astype(int)], categorical=(0,), **loose)


@pytest.mark.parametrize("value", ODD_CLASSES)
def test_a_value_that_is_no_known_class_goes_where_lightgbm_sends_it(value: float) -> None:
    booster = by_class(np.random.default_rng(2), list(range(64)))
    trees = parse(booster.model_to_string())
    assert len(trees.categorical.feature)
    assert not len(trees.numeric.feature)
    seen = np.array([[value]])
    score = Forest([trees], 1).predict(seen)[0]
    np.testing.assert_allclose(score, booster.predict(seen), rtol=0, atol=1e-9)


def test_a_split_on_a_category_beyond_63_is_refused_by_its_number() -> None:
    booster = by_class(np.random.default_rng(2), [70, 71])
    with pytest.raises(UnsupportedForest, match=r"category 7[01]"):
        forest_of(booster, features=1)


def test_two_outputs_are_evaluated_in_one_call_and_kept_apart() -> None:
    X = with_classes(table(np.random.default_rng(1), 500), np.random.default_rng(1), 7)
    one, two = train(X, law(X), trees=7), train(X, -2.0 * law(X), 11, (CLASS,), num_leaves=50)
    np.testing.assert_allclose(forest_of(one, two).predict(X), [one.predict(X), two.predict(X)], rtol=0, atol=1e-9)


def test_an_output_without_trees_scores_zero() -> None:
    X = table(np.random.default_rng(1), 300)
    booster = train(X, law(X))
    scores = Forest([no_trees(), parse(booster.model_to_string())], 4).predict(X)
    assert not scores[0].any()
    np.testing.assert_allclose(scores[1], booster.predict(X), rtol=0, atol=1e-9)


def test_a_tree_of_a_single_leaf_is_its_value() -> None:
    booster = train(np.ones((50, 4)), np.full(50, 3.5), trees=2)
    assert forest_of(booster).predict(np.ones((3, 4)))[0] == pytest.approx([3.5] * 3)


def test_no_rows_give_no_scores() -> None:
    assert Forest([no_trees(), no_trees()], 4).predict(np.zeros((0, 4))).shape == (2, 0)


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"num_leaves": 100, "min_data_in_leaf": 1}, "leaves"),
        ({"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}, "averaged"),
        ({"linear_tree": True}, "linear"),
        ({"objective": "multiclass", "num_class": 3}, "multi-class"),
    ],
)
def test_what_the_tables_cannot_hold_is_refused_by_name(params: dict[str, Any], word: str) -> None:
    X = table(np.random.default_rng(1), 500)
    y = np.arange(500.0) % 3 if "num_class" in params else law(X)
    with pytest.raises(UnsupportedForest, match=word):
        parse(train(X, y, **params).model_to_string())


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        Forest([no_trees()], 4).predict(np.zeros((2, 3)))


def test_trees_over_more_features_than_a_row_has_are_refused() -> None:
    X = table(np.random.default_rng(1), 500)
    with pytest.raises(ValueError, match="other features"):
        forest_of(train(X, law(X)), features=2)


@cache
def some_trees() -> Trees:
    """Both kinds of nodes."""
    X = with_classes(table(np.random.default_rng(3), 400), np.random.default_rng(3), 9)
    return parse(train(X, law(X), 5, (CLASS,), min_data_per_group=1, cat_smooth=0.0).model_to_string())


def altered(trees: Trees, kind: str, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Trees:
    """The trees with one column changed: one of the ``kind`` of nodes, or of the leaves when it is empty."""
    holder = getattr(trees, kind) if kind else trees
    column = change(getattr(holder, name).copy())
    changed = holder._replace(**{name: column}) if kind else column
    return msgspec.structs.replace(trees, **{kind or name: changed})


def put(at: int, value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(column: NDArray[Any]) -> NDArray[Any]:
        column[at] = value
        return column

    return change


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("numeric", "feature", put(-1, 4)),
        ("numeric", "feature", put(0, -1)),
        ("numeric", "feature", lambda column: column[::-1]),
        ("numeric", "threshold", lambda column: column[::-1]),
        ("numeric", "threshold", put(1, np.nan)),
        ("numeric", "threshold", lambda column: column[:-1]),
        ("numeric", "threshold", lambda column: column[:, None]),
        ("numeric", "tree", put(0, 5)),
        ("numeric", "tree", put(0, -1)),
        ("numeric", "tree", lambda column: column.astype(np.float64)),
        ("numeric", "keep", put(0, 0)),
        ("categorical", "feature", put(0, 4)),
        ("categorical", "tree", put(0, 5)),
        ("categorical", "keep", put(0, 0)),
        ("categorical", "categories", lambda column: column[:-1]),
        ("", "first_leaf", put(0, 1)),
        ("", "first_leaf", put(1, 0)),
        ("", "first_leaf", lambda column: column[:-1]),
        ("", "leaf_value", lambda column: column[:-40]),
        ("", "leaf_value", put(3, np.nan)),
        ("", "leaf_value", lambda column: np.full_like(column, 1e307)),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(
    kind: str, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    with pytest.raises(ValueError, match=r"forest|node"):
        Forest([altered(some_trees(), kind, name, change)], 4)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_tables_are_refused_or_answer_with_some_of_their_leaves(data: st.DataObject) -> None:
    trees = some_trees()
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["numeric", "categorical", ""]))
        holder = getattr(trees, kind) if kind else trees
        name = data.draw(st.sampled_from(holder._fields if kind else ("leaf_value", "first_leaf")))
        column = getattr(holder, name)
        place = data.draw(st.integers(0, column.nbytes - 1))
        damage = data.draw(st.integers(1, 255))

        def flip(column: NDArray[Any], place: int = place, damage: int = damage) -> NDArray[Any]:
            column.view(np.uint8)[place] ^= damage
            return column

        trees = altered(trees, kind, name, flip)
    try:
        forest = Forest([trees], 4)
    except ValueError:
        return
    scores = forest.predict(with_classes(table(np.random.default_rng(4), 50), np.random.default_rng(4), 9))
    bound = np.maximum.reduceat(np.abs(trees.leaf_value), trees.first_leaf).sum()
    assert (np.abs(scores) <= bound * (1 + 1e-9)).all()
