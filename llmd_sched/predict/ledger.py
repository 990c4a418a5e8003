"""Predictions whose outcome is still open, and how well settled ones did."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from typing import NamedTuple

import msgspec

from llmd_sched.types import QUANTILES, End, Outcome, Prediction, Sample

_MEMORY = 200
"""A running mean weighs its last few hundred entries; older ones fade."""
_VERSIONS_KEPT = 8


class RunningError:
    """Of one target: running mean of the absolute percentage error, and of how often each quantile was enough."""

    __slots__ = ("count", "coverage_pct", "mape_pct")

    def __init__(self) -> None:
        self.count = 0
        self.mape_pct = math.nan
        self.coverage_pct = [math.nan] * len(QUANTILES)

    def add(self, predicted_ms: float, quantiles_ms: tuple[float, ...], measured_ms: float) -> None:
        self.count += 1
        memory = min(self.count, _MEMORY)
        self.mape_pct = _faded(self.mape_pct, 100.0 * abs(predicted_ms - measured_ms) / measured_ms, memory)
        for level, limit_ms in enumerate(quantiles_ms):
            enough = 100.0 * (measured_ms <= limit_ms)
            self.coverage_pct[level] = _faded(self.coverage_pct[level], enough, memory)


def _faded(mean: float, value: float, memory: int) -> float:
    return value if math.isnan(mean) else mean + (value - mean) / memory


class Accuracy:
    """How far predictions were from what was then measured: running errors of both targets."""

    __slots__ = ("tpot", "ttft")

    def __init__(self) -> None:
        self.ttft = RunningError()
        self.tpot = RunningError()

    def add(self, prediction: Prediction, ttft_ms: float | None, tpot_ms: float | None) -> None:
        if ttft_ms is not None:
            self.ttft.add(prediction.ttft_ms, prediction.ttft_quantiles_ms, ttft_ms)
        if tpot_ms is not None:
            self.tpot.add(prediction.tpot_ms, prediction.tpot_quantiles_ms, tpot_ms)


class _Entry(NamedTuple):
    """One open prediction; ``told_ttft``: its first token has been a sample already."""

    prediction: Prediction
    at_s: float
    explored: bool
    told_ttft: bool = False


class Ledger:
    """Open predictions by ticket: at most ``cap`` (the oldest goes first), each for at most ``ttl_s``.

    ``counts`` has one number per fate: settled, evicted, expired, and the reasons an outcome gave no sample: unknown,
    aborted, failed, empty (no token came), unlabelled (complete, but nothing in it is a measurement).
    """

    def __init__(self, cap: int = 100_000, ttl_s: float = 900.0) -> None:
        self._cap, self._ttl_s = cap, ttl_s
        self._open: OrderedDict[str, _Entry] = OrderedDict()
        self.counts: Counter[str] = Counter()
        self.accuracy = Accuracy()
        self.accuracy_by_version: OrderedDict[int, Accuracy] = OrderedDict()
        """The last few model versions, oldest first."""

    def __len__(self) -> int:
        return len(self._open)

    def open(self, ticket: str, prediction: Prediction, at_s: float, explored: bool = False) -> None:
        """Remember what was predicted. Times must not run backwards between calls."""
        if len(self._open) >= self._cap:
            self._open.popitem(last=False)
            self.counts["evicted"] += 1
        self._open[ticket] = _Entry(prediction, at_s, explored)

    def first_token(self, ticket: str, ttft_ms: float, now_s: float) -> Sample | None:
        """Its first token was seen: that is a label, long before the reply has ended. None for one that is not open."""
        entry = self._open.get(ticket)
        if entry is None or entry.told_ttft or _positive(ttft_ms) is None:
            return None
        self._open[ticket] = entry._replace(told_ttft=True)
        prediction = entry.prediction
        self._judge(prediction, ttft_ms, None)
        sample = _sample(entry, ttft_ms, None, now_s)
        if prediction.prefill_row is None:
            return sample
        return msgspec.structs.replace(sample, row=prediction.prefill_row, endpoint=prediction.prefill_endpoint)

    def settle(self, ticket: str, outcome: Outcome, now_s: float) -> list[Sample]:
        """Close the prediction and make a sample of it, or one of each target where two endpoints did the work; none,
        counted by reason, when it teaches nothing.

        Only a complete and successful reply is a label, and only a streamed one shows its first token.
        """
        entry = self._open.pop(ticket, None)
        if entry is None:
            self.counts["unknown"] += 1
            return []
        fate, ttft_ms, tpot_ms = _labels(outcome)
        self.counts[fate] += 1
        if fate != "settled":
            return []
        prediction = entry.prediction
        ttft_ms = None if entry.told_ttft else ttft_ms
        if ttft_ms is None and tpot_ms is None:
            return []
        sample = _sample(entry, ttft_ms, tpot_ms, now_s)
        self._judge(prediction, ttft_ms, tpot_ms)
        return [sample] if prediction.prefill_row is None else _apart(sample, prediction)

    def expire(self, now_s: float) -> int:
        """Forget predictions older than ``ttl_s``; returns how many."""
        before = self.counts["expired"]
        while self._open and now_s - next(iter(self._open.values())).at_s > self._ttl_s:
            self._open.popitem(last=False)
            self.counts["expired"] += 1
        return self.counts["expired"] - before

    def _judge(self, prediction: Prediction, ttft_ms: float | None, tpot_ms: float | None) -> None:
        version = self.accuracy_by_version.setdefault(prediction.model_version, Accuracy())
        if len(self.accuracy_by_version) > _VERSIONS_KEPT:
            self.accuracy_by_version.popitem(last=False)
        for accuracy in (self.accuracy, version):
            accuracy.add(prediction, ttft_ms, tpot_ms)


def _sample(entry: _Entry, ttft_ms: float | None, tpot_ms: float | None, now_s: float) -> Sample:
    prediction = entry.prediction
    return Sample(
        row=prediction.row,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        predicted_ttft_ms=prediction.ttft_ms,
        predicted_tpot_ms=prediction.tpot_ms,
        model_version=prediction.model_version,
        at_s=now_s,
        explored=entry.explored,
        endpoint=prediction.endpoint,
    )


def _apart(sample: Sample, prediction: Prediction) -> list[Sample]:
    """TTFT as the prefill endpoint's, TPOT as the other's; what was not measured is left out."""
    assert prediction.prefill_row is not None
    replace = msgspec.structs.replace
    ttft = replace(sample, row=prediction.prefill_row, endpoint=prediction.prefill_endpoint, tpot_ms=None)
    tpot = replace(sample, ttft_ms=None)
    return [one for one in (ttft, tpot) if one.ttft_ms is not None or one.tpot_ms is not None]


def _labels(outcome: Outcome) -> tuple[str, float | None, float | None]:
    """(fate, ttft_ms, tpot_ms) of an outcome; the labels are None unless the fate is "settled"."""
    if outcome.end is not End.FINISHED:
        return "aborted", None, None
    if outcome.status != 200:
        return "failed", None, None
    if outcome.output_tokens == 0:
        return "empty", None, None
    ttft_ms = _positive(outcome.ttft_ms) if outcome.streamed else None
    tpot_ms = _positive(outcome.tpot_ms)
    return ("unlabelled" if ttft_ms is None and tpot_ms is None else "settled"), ttft_ms, tpot_ms


def _positive(value_ms: float | None) -> float | None:
    return value_ms if value_ms is not None and math.isfinite(value_ms) and value_ms > 0.0 else None
