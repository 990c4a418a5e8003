"""THE definition of a row: what the model sees of one request on one endpoint.

The row scored is the row learned, so nothing else in this package may compute a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmd_sched.types import Array, Candidates, Request

FEATURES = (
    "uncached_tokens",  # prompt tokens of this request the endpoint has no KV for
    "input_tokens",
    "prefix_match",  # share of the prompt the endpoint has KV for, 0..1
    "waiting",  # scraped: requests in the engine's queue
    "running",  # scraped: requests in the engine's batch
    "kv_usage",  # scraped: share of KV blocks in use, 0..1
    "metrics_age_s",  # how old the scraped columns are, capped
    "inflight_requests",  # our own open requests there
    "inflight_prefill_tokens",  # uncached prompt tokens we sent that have no first token yet
    "admission_wait_ms",  # until the engine can begin with another prompt, by our own predictions
    "resident_tokens",  # prompt and generated tokens of our requests that decode there
    "expected_output_tokens",
    "priority_class",  # 0 below the default priority, 1 at it, 2 above
    "lora",  # 0 no adapter asked for, 1 one that is loaded there, 2 one that would have to be loaded
    "engine_class",  # what the labels say the endpoint is (``EngineClasses``): a name, not a number
)
(
    UNCACHED,
    INPUT,
    PREFIX_MATCH,
    WAITING,
    RUNNING,
    KV_USAGE,
    METRICS_AGE,
    INFLIGHT_REQUESTS,
    INFLIGHT_PREFILL,
    ADMISSION_WAIT,
    RESIDENT,
    EXPECTED_OUTPUT,
    PRIORITY_CLASS,
    LORA,
    ENGINE_CLASS,
) = range(len(FEATURES))

_OF_THE_REQUEST = ("input_tokens", "prefix_match", "expected_output_tokens", "priority_class")
COLUMNS = tuple(name for name in FEATURES if name not in _OF_THE_REQUEST)
"""The features that differ by endpoint: the columns ``rows`` reads from its candidates."""

CATEGORICAL = (ENGINE_CLASS,)

_POSITIONS = tuple((name, FEATURES.index(name)) for name in COLUMNS)

MONOTONE = {
    "ttft": (1, 0, -1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0),
    "tpot": (0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0),
}
"""Per target and feature: 1 where more of it can only slow the request down, -1 where it can only help, 0 where
physics does not say."""

IGNORED = {"ttft": (), "tpot": (ADMISSION_WAIT,)}
"""Per target, what its trees must not look at: half a step is a TPOT predicted before, and would predict itself."""

METRICS_AGE_CAP_S = 10.0
"""Beyond this a scrape is simply old; without a cap one dead exporter would stretch the feature's range."""

MAX_CLASSES = 32
"""Engine classes told apart; endpoints of any later one count as unlabelled. The forest's kernel holds 64."""


class EngineClasses:
    """Names of the engine classes seen, each with the number it has in a row. Only ever added to.

    Number 0 is the endpoint without any of the labels.
    """

    def __init__(self, labels: Sequence[str], names: Iterable[str] = ("",)) -> None:
        self.labels = tuple(labels)
        self._codes = {name: code for code, name in enumerate(names)}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._codes)

    def code(self, labels: Mapping[str, str]) -> int:
        """The number of the class these endpoint labels mean: the values of ``self.labels``, joined."""
        name = "/".join(labels[label] for label in self.labels if labels.get(label))
        if name not in self._codes and len(self._codes) < MAX_CLASSES:
            self._codes[name] = len(self._codes)
        return self._codes.get(name, 0)


def rows(request: Request, candidates: Candidates, expected_output_tokens: float) -> NDArray[np.float64]:
    """One row per candidate, shape (len(candidates), len(FEATURES)), C order, finite and never negative.

    Needs the columns ``COLUMNS`` (KeyError without them). An unknown value (NaN or infinite) is taken to be as bad
    as the worst known candidate's; when none is known, as the whole prompt for ``uncached_tokens``, as the cap for
    ``metrics_age_s``, and as 0 for the rest, where a guess would be the same for every candidate anyway.
    """
    table = np.empty((len(candidates), len(FEATURES)))
    table[:, INPUT] = request.input_tokens
    table[:, EXPECTED_OUTPUT] = expected_output_tokens if np.isfinite(expected_output_tokens) else 0.0
    table[:, PRIORITY_CLASS] = 1 + (request.priority > 0) - (request.priority < 0)
    table[:, PREFIX_MATCH] = 0.0
    unknown = {"uncached_tokens": float(request.input_tokens), "metrics_age_s": METRICS_AGE_CAP_S}
    for name, at in _POSITIONS:
        table[:, at] = candidates.column(name)
    if not np.isfinite(table).all():
        for name, at in _POSITIONS:
            _fill_unknown(table[:, at], unknown.get(name, 0.0))
    np.maximum(table, 0.0, out=table)
    np.minimum(table[:, METRICS_AGE], METRICS_AGE_CAP_S, out=table[:, METRICS_AGE])
    table[:, PREFIX_MATCH] = prefix_match(table[:, UNCACHED], request.input_tokens)
    return table


def prefix_match(uncached_tokens: Array, input_tokens: float) -> Array:
    """The cached share of a prompt, 0..1; 0 for an empty one."""
    return np.maximum(0.0, 1.0 - uncached_tokens / max(input_tokens, 1.0)) if input_tokens else 0.0 * uncached_tokens


def _fill_unknown(column: Array, default: float) -> None:
    known = np.isfinite(column)
    column[~known] = column[known].max() if known.any() else default
