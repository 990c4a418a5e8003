"""What a request costs besides its own time: what it takes from the requests already there, and from those to come.

Read off the physical base, whose terms have these meanings; the trees, which only see sums, cannot tell them apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import features as f
from llmd_sched.predict.base import BATCH_HALF, TPOT_TERMS, TTFT_TERMS, tpot_terms
from llmd_sched.predict.model import MIN_MS, Model, Target
from llmd_sched.types import Array

_UNCACHED, _ATTENTION = TTFT_TERMS.index("uncached"), TTFT_TERMS.index("attention")
_LOAD, _BATCH, _RESIDENT = (TPOT_TERMS.index(name) for name in ("load", "batch", "resident"))


class Prices(NamedTuple):
    """Of one request on each endpoint, each (n,)."""

    prefill_ms: Array
    """Computing what the endpoint lacks of the prompt: all that run there wait for it."""
    copy_ms: Array
    """The part of it that another endpoint holds already: it would be there twice."""
    slowdown_ms: Array
    """What each token of the others takes longer while this request decodes beside them."""
    smooth_tpot_ms: Array
    """Its own TPOT, by the base alone, at the level of the prediction. Over a long reply the trees' one or two percent
    of noise are more than the whole of a TTFT, and would hide which endpoint has a prompt less to compute."""


def prices(model: Model, rows: NDArray[np.float64], log_bias: NDArray[np.float64], tpot_ms: Array) -> Prices:
    """``rows`` (n, F) as the model is given them, ``log_bias`` (2, n) of their endpoints, ``tpot_ms`` (n,) as it
    predicts."""
    uncached, prompt = rows[:, f.UNCACHED], rows[:, f.INPUT]
    ttft, tpot = _lines(model.ttft, rows), _lines(model.tpot, rows)
    held_elsewhere = uncached - uncached.min(initial=np.inf)
    slower_ttft, slower_tpot = np.exp(log_bias)
    prefill_ms = _prefill_ms(ttft, uncached, prompt) * slower_ttft
    # The last tokens of a prompt cost most, and those are what the best holder lacks too.
    copy_ms = prefill_ms - _prefill_ms(ttft, uncached - held_elsewhere, prompt) * slower_ttft
    load = np.maximum(rows[:, f.RUNNING], rows[:, f.INFLIGHT_REQUESTS])
    context = prompt + 0.5 * rows[:, f.EXPECTED_OUTPUT]
    batch = tpot[:, _BATCH] * BATCH_HALF / (load + BATCH_HALF) ** 2
    slowdown_ms = (tpot[:, _LOAD] + batch + tpot[:, _RESIDENT] * context) * slower_tpot
    smooth_ms = np.maximum((tpot_terms(rows) * tpot).sum(axis=1) * slower_tpot, MIN_MS)
    level = np.median(tpot_ms / smooth_ms) if len(smooth_ms) else 1.0
    return Prices(prefill_ms, copy_ms, slowdown_ms, smooth_ms * level)


def _prefill_ms(coefficients: NDArray[np.float64], uncached: Array, prompt: Array) -> Array:
    pairs = uncached * np.maximum(prompt - 0.5 * uncached, 0.0)
    return coefficients[:, _UNCACHED] * uncached + coefficients[:, _ATTENTION] * pairs


def _lines(target: Target, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The coefficients of each row's engine class, (n, terms)."""
    line = rows[:, f.ENGINE_CLASS].astype(np.intp) + 1
    return target.coefficients[np.where(line < len(target.coefficients), line, 0)]
