"""THE definition of a row: what the model sees of one request on one endpoint.

The row scored is the row learned, so nothing else in this package may compute a feature.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmd_sched.types import Array, Candidates, Request

FEATURES = (
    "uncached_tokens",  # prompt tokens of this request the endpoint has no KV for
    "input_tokens",
    "waiting",  # scraped: requests in the engine's queue
    "running",  # scraped: requests in the engine's batch
    "kv_usage",  # scraped: share of KV blocks in use, 0..1
    "metrics_age_s",  # how old the scraped columns are, capped
    "inflight_requests",  # our own open requests there
    "inflight_prefill_tokens",  # uncached prompt tokens we sent that have no first token yet
    "resident_tokens",  # prompt and generated tokens of our requests that decode there
    "expected_output_tokens",
)
(
    UNCACHED,
    INPUT,
    WAITING,
    RUNNING,
    KV_USAGE,
    METRICS_AGE,
    INFLIGHT_REQUESTS,
    INFLIGHT_PREFILL,
    RESIDENT,
    EXPECTED_OUTPUT,
) = range(len(FEATURES))

COLUMNS = tuple(name for name in FEATURES if name not in ("input_tokens", "expected_output_tokens"))
"""The features that differ by endpoint: the columns ``rows`` reads from its candidates."""

_POSITIONS = tuple((name, FEATURES.index(name)) for name in COLUMNS)

MONOTONE = {
    "ttft": (1, 0, 1, 1, 0, 0, 0, 1, 0, 0),
    "tpot": (0, 0, 0, 1, 0, 0, 1, 0, 1, 0),
}
"""Per target and feature: +1 where more of it can only slow the engine down, 0 where physics does not say."""

METRICS_AGE_CAP_S = 10.0
"""Beyond this a scrape is simply old; without a cap one dead exporter would stretch the feature's range."""


def rows(request: Request, candidates: Candidates, expected_output_tokens: float) -> NDArray[np.float64]:
    """One row per candidate, shape (len(candidates), len(FEATURES)), C order, finite and never negative.

    Needs the columns ``COLUMNS`` (KeyError without them). An unknown value (NaN or infinite) is taken to be as bad
    as the worst known candidate's; when none is known, as the whole prompt for ``uncached_tokens``, as the cap for
    ``metrics_age_s``, and as 0 for the rest, where a guess would be the same for every candidate anyway.
    """
    table = np.empty((len(candidates), len(FEATURES)))
    table[:, INPUT] = request.input_tokens
    table[:, EXPECTED_OUTPUT] = expected_output_tokens if np.isfinite(expected_output_tokens) else 0.0
    unknown = {"uncached_tokens": float(request.input_tokens), "metrics_age_s": METRICS_AGE_CAP_S}
    for name, at in _POSITIONS:
        table[:, at] = candidates.column(name)
    if not np.isfinite(table).all():
        for name, at in _POSITIONS:
            _fill_unknown(table[:, at], unknown.get(name, 0.0))
    np.maximum(table, 0.0, out=table)
    np.minimum(table[:, METRICS_AGE], METRICS_AGE_CAP_S, out=table[:, METRICS_AGE])
    return table


def _fill_unknown(column: Array, default: float) -> None:
    known = np.isfinite(column)
    column[~known] = column[known].max() if known.any() else default
