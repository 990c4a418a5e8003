"""LightGBM's trees on the hot path: all rows and all trees in one sweep per feature, compiled by Numba.

Each tree keeps a set of the leaves a row may still reach, one bit per leaf. A node whose test a row fails clears the
leaves below its left child; the lowest leaf left is the tree's answer (QuickScorer; Lucchese et al., SIGIR 2015).
Here the rows of a call are sorted by each feature and met with its nodes in order of threshold: a row fails all that
a smaller one fails, so a node costs once per call and not once per row. Nothing is built before the first use, so a
model is ready as soon as its arrays are checked. 100 rows x 300 trees of 31 leaves take an eighth of the time that
QuickScorer row by row takes, and a twelfth of ``Booster.predict``'s.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

MAX_LEAVES = 64
MAX_CATEGORY = 63
COMPARE = 2
"""In ``on_zero``: this node has no rule for zero, compare as usual. (0 = go left, 1 = go right.)"""

_CATEGORICAL, _DEFAULT_LEFT = 1, 2
_MISSING_NONE, _MISSING_ZERO = 0, 1
_ZERO = 1.0000000180025095e-35  # 1e-35 as a float32: what LightGBM reads as zero
_ALL = (1 << 64) - 1

_DTYPES: dict[str, Any] = {
    "feature": np.int32,
    "threshold": np.float64,
    "tree": np.int32,
    "keep": np.uint64,
    "on_nan": np.uint8,
    "on_zero": np.uint8,
    "categories": np.uint64,
    "leaf_value": np.float64,
    "first_leaf": np.int64,
}


class UnsupportedForest(ValueError):
    """The booster uses something these tables cannot hold; the message says what."""


class Numeric(NamedTuple):
    """The tests ``value <= threshold``, aligned arrays in order of feature, then threshold."""

    feature: NDArray[np.int32]
    threshold: NDArray[np.float64]
    tree: NDArray[np.int32]
    keep: NDArray[np.uint64]
    """The leaves that remain when the test fails: all but those under the left child."""
    on_nan: NDArray[np.uint8]
    """0 = a NaN goes left, 1 = it goes right."""
    on_zero: NDArray[np.uint8]
    """Where a value of (nearly) zero goes when zero means missing; ``COMPARE`` otherwise."""


class Categorical(NamedTuple):
    """The tests ``int(value) in categories``, aligned arrays in order of feature. Whatever is not in 0 .. 63 fails."""

    feature: NDArray[np.int32]
    categories: NDArray[np.uint64]
    """Bit c = category c."""
    tree: NDArray[np.int32]
    keep: NDArray[np.uint64]


class Trees(msgspec.Struct, frozen=True, eq=False):
    """The trees of one output: their inner nodes, and their leaves."""

    numeric: Numeric
    categorical: Categorical
    leaf_value: NDArray[np.float64]
    """All trees' leaves, each tree's from left to right."""
    first_leaf: NDArray[np.int64]
    """Per tree, where its leaves start in ``leaf_value``."""


# -------------------------------------------------------------------------------------------------------- parsing

_NumericNode = tuple[int, float, int, int, int, int]
_CategoricalNode = tuple[int, int, int, int]


def no_trees() -> Trees:
    """A forest that adds nothing."""
    return _trees([], [], [], [])


def parse(model_text: str) -> Trees:
    """Trees of a ``Booster.model_to_string()``. UnsupportedForest for categories beyond 63, linear leaves, averaged
    (random forest) or multi-class boosters, and trees of more than 64 leaves."""
    header, *blocks = model_text.split("end of trees")[0].split("\nTree=")
    if "num_tree_per_iteration=1\n" not in header + "\n":
        raise UnsupportedForest("multi-class boosters have no single output")
    if "average_output" in header:
        raise UnsupportedForest("averaged trees (random forests) are not supported")
    numeric: list[_NumericNode] = []
    categorical: list[_CategoricalNode] = []
    leaf_values: list[float] = []
    first_leaf: list[int] = []
    for number, block in enumerate(blocks):
        fields = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        first_leaf.append(len(leaf_values))
        leaf_values += _add_tree(number, fields, numeric, categorical)
    return _trees(numeric, categorical, leaf_values, first_leaf)


def _add_tree(
    number: int, fields: dict[str, str], numeric: list[_NumericNode], categorical: list[_CategoricalNode]
) -> list[float]:
    """Append one tree's nodes; returns its leaves from left to right, as which they are numbered."""
    values = [float(text) for text in fields["leaf_value"].split()]
    if fields.get("is_linear", "0") != "0":
        raise UnsupportedForest("linear leaves are not supported")
    if len(values) > MAX_LEAVES:
        raise UnsupportedForest(f"a tree has {len(values)} leaves, at most {MAX_LEAVES} fit")
    if len(values) == 1:
        return values
    feature, decision, left, right = (
        [int(text) for text in fields[name].split()]
        for name in ("split_feature", "decision_type", "left_child", "right_child")
    )
    threshold = [float(text) for text in fields["threshold"].split()]
    sets = _category_sets(fields)
    order: list[int] = []

    def leaves_below(node: int) -> int:
        if node < 0:
            order.append(~node)
            return 1 << (len(order) - 1)
        below_left = leaves_below(left[node])
        keep = _ALL & ~below_left
        if decision[node] & _CATEGORICAL:
            categorical.append((feature[node], sets[int(threshold[node])], number, keep))
        else:
            missing = _missing_rules(decision[node], threshold[node])
            numeric.append((feature[node], _around_zero(threshold[node]), number, keep, *missing))
        return below_left | leaves_below(right[node])

    leaves_below(0)
    return [values[leaf] for leaf in order]


def _category_sets(fields: dict[str, str]) -> list[int]:
    """A tree's sets of categories; a categorical node's threshold says which is its own."""
    bounds = [int(text) for text in fields.get("cat_boundaries", "0").split()]
    words = [int(text) for text in fields.get("cat_threshold", "").split()]
    sets = [sum(word << (32 * i) for i, word in enumerate(words[begin:end])) for begin, end in pairwise(bounds)]
    largest = max((categories.bit_length() - 1 for categories in sets), default=0)
    if largest > MAX_CATEGORY:
        raise UnsupportedForest(f"a split names the category {largest}, at most {MAX_CATEGORY} fits")
    return sets


def _missing_rules(decision: int, threshold: float) -> tuple[int, int]:
    """(on_nan, on_zero) of LightGBM's decision byte: bit 1 = default left, bits 2-3 = what counts as missing."""
    default = 0 if decision & _DEFAULT_LEFT else 1
    missing = (decision >> 2) & 3
    if missing == _MISSING_NONE:  # a NaN is then read as zero
        return (0 if threshold >= 0.0 else 1), COMPARE
    return default, (default if missing == _MISSING_ZERO else COMPARE)


def _around_zero(threshold: float) -> float:
    """A threshold that tells apart what LightGBM does, which takes every value within ``_ZERO`` of zero for zero."""
    if abs(threshold) > _ZERO:
        return threshold
    return _ZERO if threshold >= 0.0 else math.nextafter(-_ZERO, -math.inf)


def _trees(
    numeric: list[_NumericNode],
    categorical: list[_CategoricalNode],
    leaf_values: list[float],
    first_leaf: list[int],
) -> Trees:
    return Trees(
        Numeric(*_columns(Numeric._fields, numeric)),
        Categorical(*_columns(Categorical._fields, categorical)),
        np.array(leaf_values, dtype=np.float64),
        np.array(first_leaf, dtype=np.int64),
    )


def _columns(names: tuple[str, ...], nodes: list[Any]) -> list[NDArray[Any]]:
    columns = list(zip(*sorted(nodes), strict=True)) or [()] * len(names)
    return [np.array(column, dtype=_DTYPES[name]) for name, column in zip(names, columns, strict=True)]


# ------------------------------------------------------------------------------------------------------ the tables


class Forest:
    """Several outputs' trees, checked and ready for the kernel. Immutable once made."""

    __slots__ = ("_outputs", "features")

    def __init__(self, outputs: list[Trees], features: int) -> None:
        """ValueError when a table points outside the others: the kernel itself checks no bounds."""
        self.features = features
        self._outputs = [_output(trees, features) for trees in outputs]

    def predict(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Raw scores, shape (outputs, n), of rows (n, features): what ``Booster.predict(raw_score=True)`` gives."""
        if rows.ndim != 2 or rows.shape[1] != self.features:
            raise ValueError(f"rows have shape {rows.shape}, expected (n, {self.features})")
        scores = np.empty((len(self._outputs), len(rows)))
        if len(rows):
            columns = np.ascontiguousarray(rows.T, dtype=np.float64)
            order = columns.argsort(axis=1)  # NaN last
            for output, its_scores in zip(self._outputs, scores, strict=True):
                _evaluate(columns, order, output, its_scores)
        return scores


class _Output(NamedTuple):
    """One output's trees as the kernel takes them."""

    numeric: Numeric
    categorical: Categorical
    first_numeric: NDArray[np.int64]
    """Per feature, and one beyond: where its nodes begin."""
    first_categorical: NDArray[np.int64]
    zero_is_missing: bool
    leaf_value: NDArray[np.float64]
    first_leaf: NDArray[np.int64]


def _output(trees: Trees, features: int) -> _Output:
    widest = _check(trees, features)
    numeric, categorical = trees.numeric, trees.categorical
    leaf_set = np.uint32 if widest <= 32 else np.uint64  # half the memory to sweep, where it is enough
    every = np.arange(features + 1, dtype=np.int32)
    return _Output(
        numeric=numeric._replace(keep=numeric.keep.astype(leaf_set)),
        categorical=categorical._replace(keep=categorical.keep.astype(leaf_set)),
        first_numeric=np.searchsorted(numeric.feature, every),
        first_categorical=np.searchsorted(categorical.feature, every),
        zero_is_missing=bool((numeric.on_zero != COMPARE).any()),
        leaf_value=trees.leaf_value,
        first_leaf=trees.first_leaf,
    )


def _check(trees: Trees, features: int) -> int:
    """Every index that can come up is inside what it points to; returns the number of leaves of the largest tree."""
    _check_columns(first_leaf=trees.first_leaf)
    _check_columns(leaf_value=trees.leaf_value)
    leaves = np.diff(np.append(trees.first_leaf, len(trees.leaf_value)))
    widest = int(leaves.max(initial=0))
    if len(leaves) and (trees.first_leaf[0] != 0 or leaves.min() < 1 or widest > MAX_LEAVES):
        raise ValueError("the forest's leaves do not fit its trees")
    with np.errstate(over="ignore"):  # that is what is looked for
        if not np.isfinite(np.abs(trees.leaf_value).sum()):
            raise ValueError("the leaves of the forest do not add up to a finite number")
    _check_nodes(trees.numeric, leaves, features)
    _check_nodes(trees.categorical, leaves, features)
    threshold, same_feature = trees.numeric.threshold, np.diff(trees.numeric.feature) == 0
    if not (threshold[1:] >= threshold[:-1])[same_feature].all():
        raise ValueError("the forest's thresholds are not in order")
    return widest


def _check_columns(**columns: NDArray[Any]) -> None:
    shapes = {column.shape for column in columns.values()}
    wrong = [name for name, column in columns.items() if column.dtype != _DTYPES[name] or column.ndim != 1]
    if wrong or len(shapes) != 1:
        raise ValueError(f"the forest's columns {', '.join(columns)} do not fit together")


def _check_nodes(nodes: Numeric | Categorical, leaves: NDArray[np.int64], features: int) -> None:
    _check_columns(**nodes._asdict())
    feature, tree = nodes.feature, nodes.tree
    if not len(feature):
        return
    if feature.min() < 0 or feature.max() >= features:
        raise ValueError(f"the forest was trained on other features than the {features} of a row")
    if (np.diff(feature) < 0).any():
        raise ValueError("the forest's nodes are not in order of feature")
    if tree.min() < 0 or tree.max() >= len(leaves):
        raise ValueError("a node belongs to no tree")
    # No test clears a tree's last leaf, so a lowest leaf is always left and is one of the tree's own.
    if not ((nodes.keep >> (leaves[tree] - 1).astype(np.uint64)) & np.uint64(1)).all():
        raise ValueError("a node clears its tree's last leaf")


# ------------------------------------------------------------------------------------------------------ the kernel


def _count_trailing_zeros(_context: Any, _bits: Any) -> Any:
    """Index of the lowest set bit of a non-zero uint64, as one machine instruction."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], context.get_constant(types.boolean, True))

    return types.uint64(types.uint64), generate


_lowest_bit: Any = intrinsic(_count_trailing_zeros)


@njit(cache=True, nogil=True)
def _evaluate(columns: Any, order: Any, output: Any, scores: Any) -> None:
    """``scores`` (n,) of ``columns`` (features, n); ``order`` (features, n) sorts each column."""
    numeric, categorical, trees = output.numeric, output.categorical, len(output.first_leaf)
    reachable = np.full((len(scores), trees), _ALL, numeric.keep.dtype)
    for f in range(len(columns)):
        begin, end = output.first_numeric[f], output.first_numeric[f + 1]
        if begin < end:
            _sweep_thresholds(columns[f], order[f], numeric, begin, end, output.zero_is_missing, reachable)
        begin, end = output.first_categorical[f], output.first_categorical[f + 1]
        if begin < end:
            _sweep_categories(columns[f], order[f], categorical, begin, end, reachable)
    for row in range(len(scores)):
        total = 0.0
        for tree in range(trees):
            leaf = _lowest_bit(np.uint64(reachable[row, tree]))
            total += output.leaf_value[np.uint64(output.first_leaf[tree]) + leaf]
        scores[row] = total


@njit(cache=True, nogil=True)
def _sweep_thresholds(
    column: Any, order: Any, nodes: Any, begin: Any, end: Any, zero_is_missing: Any, reachable: Any
) -> None:
    """Take from ``reachable`` (n, trees) what each row loses to one feature's nodes ``begin`` .. ``end``."""
    left = np.full(reachable.shape[1], _ALL, reachable.dtype)
    node = begin
    for place in range(len(order)):
        row = np.uint64(order[place])
        value = column[row]
        if np.isnan(value) or (zero_is_missing and abs(value) <= _ZERO):
            rules = nodes.on_nan if np.isnan(value) else nodes.on_zero
            for i in range(begin, end):
                if rules[i] == 1 or (rules[i] == COMPARE and nodes.threshold[i] < 0.0):
                    reachable[row, nodes.tree[i]] &= nodes.keep[i]
            continue
        while node < end and nodes.threshold[node] < value:
            left[np.uint64(nodes.tree[node])] &= nodes.keep[node]
            node += 1
        if node > begin:
            for tree in range(len(left)):
                reachable[row, tree] &= left[tree]


@njit(cache=True, nogil=True)
def _sweep_categories(column: Any, order: Any, nodes: Any, begin: Any, end: Any, reachable: Any) -> None:
    """The same for categories: rows of one category are neighbours in ``order``, so it is looked up once."""
    left = np.full(reachable.shape[1], _ALL, reachable.dtype)
    seen = -1
    for place in range(len(order)):
        row = np.uint64(order[place])
        value = column[row]
        category = int(value) if -1.0 < value < MAX_CATEGORY + 1 else MAX_CATEGORY + 1  # the latter also for NaN
        if category != seen:
            seen = category
            left[:] = _ALL
            for i in range(begin, end):
                if category > MAX_CATEGORY or not (nodes.categories[i] >> np.uint64(category)) & np.uint64(1):
                    left[nodes.tree[i]] &= nodes.keep[i]
        for tree in range(len(left)):
            reachable[row, tree] &= left[tree]
