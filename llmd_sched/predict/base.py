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
    "attention",  # own prefill, quadratic part: pairs of (new token, token before it)
    "inflight_prefill",  # prefill dispatched before us
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
        ttft=(60.0, 0.1, 1.5e-6, 0.08, 0.5, 20.0, 0.0, 0.02, 1e-4),
        tpot=(20.0, 0.05, 2.0, 4.0, 12.0, 2.0, 1e-4),
    ),
    "llama-3-8b-h100": Preset(
        ttft=(25.0, 0.0197, 6.5e-7, 0.016, 0.05, 4.0, 0.0, 0.004, 5e-5),
        tpot=(6.9, 0.024, 0.5, 1.0, 5.0, 0.5, 5e-5),
    ),
    "qwen3-32b-h100x2": Preset(
        ttft=(33.0, 0.048, 1.5e-6, 0.04, 0.1, 10.0, 0.0, 0.01, 5e-5),
        tpot=(14.0, 0.027, 1.0, 2.0, 10.0, 1.0, 5e-5),
    ),
    "qwen3-32b-h200": Preset(
        ttft=(41.0, 0.095, 1.4e-6, 0.08, 0.5, 15.0, 0.0, 0.02, 4e-5),
        tpot=(18.5, 0.03, 2.0, 2.0, 10.0, 1.0, 4e-5),
    ),
}
"""Preset by name; `default` is for hardware nothing is known about."""


@njit(cache=True, nogil=True)
def ttft_terms(rows: Any) -> Any:
    """The TTFT_TERMS of feature rows (n, F) -> (n, terms). Compiled: a decision calls it with a handful of rows."""
    terms = np.empty((rows.shape[0], 9))
    for i in range(rows.shape[0]):
        uncached, waiting, inflight = rows[i, f.UNCACHED], rows[i, f.WAITING], rows[i, f.INFLIGHT_PREFILL]
        load = max(rows[i, f.RUNNING], rows[i, f.INFLIGHT_REQUESTS])
        terms[i, 0] = 1.0
        terms[i, 1] = uncached
        terms[i, 2] = uncached * max(rows[i, f.INPUT] - 0.5 * uncached, 0.0)
        terms[i, 3] = inflight
        terms[i, 4] = load
        terms[i, 5] = waiting
        terms[i, 6] = load * inflight
        terms[i, 7] = inflight * (waiting / (waiting + QUEUE_HALF))
        terms[i, 8] = rows[i, f.RESIDENT]
    return terms


@njit(cache=True, nogil=True)
def tpot_terms(rows: Any) -> Any:
    """The TPOT_TERMS of feature rows (n, F) -> (n, terms)."""
    terms = np.empty((rows.shape[0], 7))
    for i in range(rows.shape[0]):
        inflight = rows[i, f.INFLIGHT_PREFILL]
        load = max(rows[i, f.RUNNING], rows[i, f.INFLIGHT_REQUESTS])
        terms[i, 0] = 1.0
        terms[i, 1] = load
        terms[i, 2] = load / (load + BATCH_HALF)
        terms[i, 3] = inflight / (inflight + CHUNK_HALF_TOKENS)
        terms[i, 4] = inflight / (inflight + BACKLOG_HALF_TOKENS)
        terms[i, 5] = rows[i, f.KV_USAGE]
        terms[i, 6] = rows[i, f.RESIDENT]
    return terms


TERMS = {"ttft": ttft_terms, "tpot": tpot_terms}


def fit(terms: NDArray[np.float64], y_ms: Array, weight: Array, prior: Array, ridge_rows: float = 3.0) -> Array:
    """Non-negative coefficients (terms,) that minimise sum(weight x |log(terms @ c / y)|), approximately.

    Eight rounds of reweighted non-negative least squares on the relative residual 1 - terms @ c / y, each row weighted
    so that its square equals its absolute log error: a stall counts by how many times it was late, not by how long.
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
        factor = np.minimum(np.abs(np.log(ratio)) / np.maximum((1.0 - ratio) ** 2, 1e-4), 50.0)
    coefficients = prior.copy()
    coefficients[seen] = share / scale[seen]
    return coefficients
