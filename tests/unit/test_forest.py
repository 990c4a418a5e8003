from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmd_sched.predict.forest import Forest, UnsupportedForest, no_trees, parse

QUIET = {"verbosity": -1, "num_threads": 1, "min_data_in_leaf": 5}


def train(X: NDArray[np.float64], y: NDArray[np.float64], trees: int = 10, **params: Any) -> lgb.Booster:
    both = {**QUIET, **params}
    return lgb.train({"objective": "regression", **both}, lgb.Dataset(X, y, params=both), trees)


def table(rng: np.random.Generator, count: int, missing: float = 0.0, zeros: float = 0.0) -> NDArray[np.float64]:
    X = rng.normal(size=(count, 4)) * [1.0, 100.0, 1e-3, 5.0]
    X[rng.random(X.shape) < zeros] = 0.0
    X[rng.random(X.shape) < missing] = np.nan
    return X


def law(X: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.nan_to_num(X)
    return known[:, 0] + 0.01 * known[:, 1] ** 2 - 200.0 * known[:, 2] + 3.0 * np.isnan(X[:, 3])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    leaves=st.sampled_from([2, 3, 15, 31, 64]),
    objective=st.sampled_from(["regression", "regression_l1", "huber", "quantile"]),
    missing=st.sampled_from([0.0, 0.2]),
    zeros=st.sampled_from([0.0, 0.3]),
    zero_as_missing=st.booleans(),
    use_missing=st.booleans(),
    monotone=st.booleans(),
)
def test_the_kernel_says_what_the_booster_says(
    seed: int,
    leaves: int,
    objective: str,
    missing: float,
    zeros: float,
    zero_as_missing: bool,
    use_missing: bool,
    monotone: bool,
) -> None:
    rng = np.random.default_rng(seed)
    X = table(rng, 300, missing, zeros)
    params: dict[str, Any] = {
        "objective": objective,
        "num_leaves": leaves,
        "zero_as_missing": zero_as_missing,
        "use_missing": use_missing,
    }
    if monotone and objective in ("regression", "huber"):
        params["monotone_constraints"] = [1, 0, -1, 0]
    booster = train(X, law(X), **params)
    seen = table(rng, 200, 0.2, 0.2)
    thresholds = np.array(parse(booster.model_to_string()).threshold)
    if len(thresholds):  # a value exactly on a threshold goes left
        seen[:50, 0] = rng.choice(thresholds, 50)
    scores = Forest([parse(booster.model_to_string())], 4).predict(seen)
    np.testing.assert_allclose(scores[0], booster.predict(seen, raw_score=True), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-36, -1e-36, 1.0000000180025095e-35, -1.0000000180025095e-35, 1e-34])
def test_what_lightgbm_reads_as_zero_is_zero(tiny: float) -> None:
    X = table(np.random.default_rng(0), 300, 0.2, 0.3)
    booster = train(X, law(X), objective="regression_l1", num_leaves=15, use_missing=False)
    seen = np.full((1, 4), tiny)
    score = Forest([parse(booster.model_to_string())], 4).predict(seen)[0]
    np.testing.assert_allclose(score, booster.predict(seen), rtol=0, atol=1e-9)


def test_two_outputs_are_evaluated_in_one_call_and_kept_apart() -> None:
    X = table(np.random.default_rng(1), 500)
    one, two = train(X, law(X), trees=7), train(X, -2.0 * law(X), trees=11, num_leaves=5)
    scores = Forest([parse(one.model_to_string()), parse(two.model_to_string())], 4).predict(X)
    np.testing.assert_allclose(scores, [one.predict(X), two.predict(X)], rtol=0, atol=1e-9)


def test_an_output_without_trees_scores_zero() -> None:
    X = table(np.random.default_rng(1), 300)
    booster = train(X, law(X))
    scores = Forest([no_trees(), parse(booster.model_to_string())], 4).predict(X)
    assert not scores[0].any()
    np.testing.assert_allclose(scores[1], booster.predict(X), rtol=0, atol=1e-9)


def test_a_tree_of_a_single_leaf_is_its_value() -> None:
    X = np.ones((50, 4))
    booster = train(X, np.full(50, 3.5), trees=2)
    assert Forest([parse(booster.model_to_string())], 4).predict(X[:3])[0] == pytest.approx([3.5] * 3)


def test_no_rows_give_no_scores() -> None:
    assert Forest([no_trees(), no_trees()], 4).predict(np.zeros((0, 4))).shape == (2, 0)


def test_a_categorical_split_is_refused() -> None:
    rng = np.random.default_rng(2)
    X = rng.integers(0, 4, (400, 1)).astype(float)
    params = {**QUIET, "min_data_per_group": 1, "cat_smooth": 0.0}
    data = lgb.Dataset(X, np.array([3.0, -1.0, 8.0, 0.0])[X[:, 0].astype(int)], categorical_feature=[0], params=params)
    booster = lgb.train({"objective": "regression", **params}, data, 2)
    with pytest.raises(UnsupportedForest, match="categorical"):
        parse(booster.model_to_string())


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"num_leaves": 100, "min_data_in_leaf": 1}, "leaves"),
        ({"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}, "averaged"),
        ({"linear_tree": True}, "linear"),
    ],
)
def test_what_the_tables_cannot_hold_is_refused_by_name(params: dict[str, Any], word: str) -> None:
    X = table(np.random.default_rng(1), 500)
    with pytest.raises(UnsupportedForest, match=word):
        parse(train(X, law(X), **params).model_to_string())


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        Forest([no_trees()], 4).predict(np.zeros((2, 3)))


def test_trees_over_more_features_than_a_row_has_are_refused() -> None:
    X = table(np.random.default_rng(1), 500)
    trees = parse(train(X, law(X)).model_to_string())
    with pytest.raises(ValueError, match="other features"):
        Forest([trees], 2)
