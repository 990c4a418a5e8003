"""The physical base of each target: a few non-negative terms that extrapolate to loads nobody has seen yet.

Trees are constant outside their training data; a queue is not. So the base carries the growth, and the trees only
what is left of the logarithm. Everything is in milliseconds; a coefficient's unit is ms per unit of its term.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import nnls

from llmd_sched.predict import features as f
from llmd_sched.types import Array

TargetName = Literal["ttft", "tpot"]

TTFT_TERMS = (
    "constant",
    "uncached",  # own prefill, linear part
    "input",  # prompt tokens, believed cached or not: where that belief is wrong, this grows
    "attention",  # own prefill, quadratic part: pairs of (new token, token before it)
    "inflight_prefill",  # prefill dispatched before us
    "admission_wait",  # ... and the time until it is done, or until the step under way ends
    "load",  # requests there, whoever sent them
    "waiting",
    "load_x_inflight",  # decode shares each step's token budget with the prefill ahead of us
    "queued_prefill",  # the part of the prefill ahead that has not begun: none when nothing waits
    "resident",
)
TPOT_TERMS = (
    "constant",
    "load",
    "batch",  # the batch is capped, so its cost saturates
    "prefill_share",  # chunks of others' prompts ride in our decode steps; a step's token budget bounds them,
    "prefill_backlog",  # ... for a fraction of our decode that grows with the backlog
    "kv_usage",
    "resident",  # KV read per step
)
QUEUE_HALF = 2.0
BATCH_HALF = 16.0
CHUNK_HALF_TOKENS = 2048.0
BACKLOG_HALF_TOKENS = 32768.0
"""Where the saturating terms reach one half. Chosen on the recorded Qwen3-32B/H200 rows; flat around these values."""


class Preset(msgspec.Struct, frozen=True):
    """Coefficients to start from, in the order of TTFT_TERMS and TPOT_TERMS."""

    ttft: tuple[float, ...]
    tpot: tuple[float, ...]


# A step costs b0 + b1 x prefill tokens + c x attention pairs + b2 x sequences + k x resident tokens. Sources: the
# public fits of engine step times and, for the H200, the recorded traces. `default` errs on the slow side of them.
COLD_START = {
    "default": Preset(
        ttft=(60.0, 0.1, 2e-4, 1.5e-6, 0.08, 0.0, 0.5, 20.0, 0.0, 0.02, 1e-4),
        tpot=(20.0, 0.05, 2.0, 4.0, 12.0, 2.0, 1e-4),
    ),
    "llama-3-8b-h100": Preset(
        ttft=(25.0, 0.0197, 1e-4, 6.5e-7, 0.016, 0.0, 0.05, 4.0, 0.0, 0.004, 5e-5),
        tpot=(6.9, 0.024, 0.5, 1.0, 5.0, 0.5, 5e-5),
    ),
    "qwen3-32b-h100x2": Preset(
        ttft=(33.0, 0.048, 1e-4, 1.5e-6, 0.04, 0.0, 0.1, 10.0, 0.0, 0.01, 5e-5),
        tpot=(14.0, 0.027, 1.0, 2.0, 10.0, 1.0, 5e-5),
    ),
    "qwen3-32b-h200": Preset(
        ttft=(41.0, 0.095, 1e-4, 1.4e-6, 0.08, 0.0, 0.5, 15.0, 0.0, 0.02, 4e-5),
        tpot=(18.5, 0.03, 2.0, 2.0, 10.0, 1.0, 4e-5),
    ),
}
"""Preset by name; `default` is for hardware nothing is known about."""


# Compiled code is kept on disk until its own file changes, so what it takes from another file must be an argument.
_TTFT_COLUMNS = np.array(
    [f.UNCACHED, f.INPUT, f.WAITING, f.RUNNING, f.INFLIGHT_REQUESTS, f.INFLIGHT_PREFILL, f.ADMISSION_WAIT, f.RESIDENT]
)
_TPOT_COLUMNS = np.array([f.RUNNING, f.INFLIGHT_REQUESTS, f.INFLIGHT_PREFILL, f.KV_USAGE, f.RESIDENT])


def ttft_terms(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The TTFT_TERMS of feature rows (n, F) -> (n, terms)."""
    return np.asarray(_ttft_terms(rows, _TTFT_COLUMNS))


def tpot_terms(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The TPOT_TERMS of feature rows (n, F) -> (n, terms)."""
    return np.asarray(_tpot_terms(rows, _TPOT_COLUMNS))


@njit(cache=True, nogil=True)
def _ttft_terms(rows: Any, at: Any) -> Any:
    terms = np.empty((rows.shape[0], 11))
    for i in range(rows.shape[0]):
        uncached, prompt, waiting, inflight = rows[i, at[0]], rows[i, at[1]], rows[i, at[2]], rows[i, at[5]]
        load = max(rows[i, at[3]], rows[i, at[4]])
        terms[i, 0] = 1.0
        terms[i, 1] = uncached
        terms[i, 2] = prompt
        terms[i, 3] = uncached * max(prompt - 0.5 * uncached, 0.0)
        terms[i, 4] = inflight
        terms[i, 5] = rows[i, at[6]]
        terms[i, 6] = load
        terms[i, 7] = waiting
        terms[i, 8] = load * inflight
        terms[i, 9] = inflight * (waiting / (waiting + QUEUE_HALF))
        terms[i, 10] = rows[i, at[7]]
    return terms


@njit(cache=True, nogil=True)
def _tpot_terms(rows: Any, at: Any) -> Any:
    terms = np.empty((rows.shape[0], 7))
    for i in range(rows.shape[0]):
        load, inflight = max(rows[i, at[0]], rows[i, at[1]]), rows[i, at[2]]
        terms[i, 0] = 1.0
        terms[i, 1] = load
        terms[i, 2] = load / (load + BATCH_HALF)
        terms[i, 3] = inflight / (inflight + CHUNK_HALF_TOKENS)
        terms[i, 4] = inflight / (inflight + BACKLOG_HALF_TOKENS)
        terms[i, 5] = rows[i, at[3]]
        terms[i, 6] = rows[i, at[4]]
    return terms


TERMS = {"ttft": ttft_terms, "tpot": tpot_terms}


@njit(cache=True, nogil=True)
def base_ms(terms: Any, coefficients: Any, engine_class: Any) -> Any:
    """The base of each row (n,) from its terms (n, T), by its engine class's line of ``coefficients`` (1 + classes, T).

    Line 0 is the whole pool's, for classes (n,) that have no line yet.
    """
    out = np.zeros(terms.shape[0])
    for i in range(terms.shape[0]):
        line = engine_class[i] + 1.0
        at = np.int64(line) if 0.0 <= line < coefficients.shape[0] else 0
        for k in range(terms.shape[1]):
            out[i] += terms[i, k] * coefficients[at, k]
    return out


def fit_classes(
    terms: NDArray[np.float64], y_ms: Array, weight: Array, classes: NDArray[np.int64], prior: Array, ridge_rows: float
) -> NDArray[np.float64]:
    """Coefficients (1 + highest class, T): the pool's, then each class's own.

    A class starts from the pool's shape at the level its own rows show (``fit``'s prior), so a new kind of engine
    needs a handful of rows; a class without any keeps the pool's line.
    """
    pooled = fit(terms, y_ms, weight, prior, ridge_rows)
    present = np.unique(classes)
    table = np.tile(pooled, (2 + int(present[-1]), 1))
    if len(present) > 1:
        for one in present:
            own = classes == one
            table[1 + one] = fit(terms[own], y_ms[own], weight[own], pooled, ridge_rows)
    return table


def fit(terms: NDArray[np.float64], y_ms: Array, weight: Array, prior: Array, ridge_rows: float = 3.0) -> Array:
    """Non-negative coefficients c (terms,) of the least absolute percentage error, sum(weight x |1 - terms @ c / y|).

    Eight rounds of reweighted non-negative least squares, each row weighted so that its square equals its absolute
    value (below 5 % it stays a square): a stall costs at most one row, however long it was.
    ``prior`` (terms,) gives the shape where data is silent: scaled to the data's level, it weighs as much as
    ``ridge_rows`` average rows, and a term that never occurred keeps it.
    """
    relative = terms / y_ms[:, None]
    prior = prior / np.clip(np.median(relative @ prior), 0.02, 50.0)
    scale = relative.mean(axis=0)  # after scaling, a coefficient is the share of y its term explains
    seen = scale > 0.0
    relative = relative[:, seen] / scale[seen]
    expected = prior[seen] * scale[seen]
    pull = ridge_rows * weight.mean()
    factor = np.ones(len(y_ms))
    share = expected
    for _ in range(8):
        weighted = relative * (weight * factor)[:, None]
        # The normal equations' Cholesky factor holds all nnls needs of the tall matrix; the pull keeps it regular.
        gram = weighted.T @ relative + pull * np.eye(len(expected))
        upper = np.linalg.cholesky(gram).T
        share, _ = nnls(upper, np.linalg.solve(upper.T, weighted.sum(axis=0) + pull * expected))
        ratio = np.maximum(relative @ share, 1e-6)
        factor = 1.0 / np.maximum(np.abs(1.0 - ratio), 0.05)
    coefficients = prior.copy()
    coefficients[seen] = share / scale[seen]
    return coefficients
