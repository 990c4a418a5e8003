"""What is told of each request: metrics, traces, the last decisions, the outcome log.

The outcome log, when asked for, has one JSON line per finished request: what was predicted, by which model version,
and what was measured. It is the record against which anyone can check our numbers.
"""

from __future__ import annotations

import logging
import logging.handlers
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from llmd_sched.errors import ConfigError, RequestError
from llmd_sched.prefix.hashing import BYTES_PER_TOKEN
from llmd_sched.telemetry import Series, Telemetry
from llmd_sched.tracing import Tracer
from llmd_sched.types import Decision, End, Outcome, Request, Rewritten

OUTCOME_LOG_BYTES = 256 << 20

DISAGG_DECISIONS = {
    frozenset[str](): "decode-only",
    frozenset({"prefill"}): "prefill-decode",
    frozenset({"encode"}): "encode-decode",
    frozenset({"encode", "prefill"}): "encode-prefill-decode",
}
"""Stages done elsewhere than on the decode endpoint -> the reference's word for it."""


class DecisionLog(Protocol):
    """Keeps the last decisions for whoever asks."""

    def add(self, decision: Decision, at: float) -> None: ...

    def finish(self, ticket: str, outcome: Outcome) -> None: ...


class Observer:
    """``indexes``: name and type of the prefix indexes. ``disagg``: those of the profile handler, when it may split a
    request over endpoints."""

    def __init__(
        self,
        telemetry: Telemetry,
        *,
        tracer: Tracer | None = None,
        decisions: DecisionLog | None = None,
        outcome_log: logging.Logger | None = None,
        disagg: tuple[str, str] | None = None,
        indexes: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.telemetry = telemetry
        self.tracer = tracer or Tracer()
        self._decisions = decisions
        self._outcome_log = outcome_log
        self._disagg = disagg
        self._indexes = tuple(indexes)
        self._hit_ratio = telemetry.histogram("prefix_indexer_hit_ratio")
        self._hit_bytes = telemetry.histogram("prefix_indexer_hit_bytes")

    @property
    def traces(self) -> bool:
        return type(self.tracer) is not Tracer

    def series(self, request: Request) -> Series:
        return self.telemetry.series(request.model, request.target_model, request.fairness_id, request.priority)

    def received(self, request: Request) -> None:
        series = self.series(request)
        series.requests.inc()
        series.size_bytes.observe(request.size_bytes)

    def rewritten(self, model: str, rewritten: Rewritten) -> None:
        names = self.telemetry.labels(model, rewritten.model, "", 0)[:2]
        self.telemetry.counter("model_rewrite_decisions_total").labels(rewritten.by, *names).inc()

    def ignored(self, header: str) -> None:
        """A header whose value is unusable."""
        self.telemetry.ignored_headers.labels(header).inc()

    def refused(self, request: Request, error: RequestError) -> None:
        series = self.series(request)
        self.telemetry.errors.labels(*series.labels, error.code).inc()
        self.telemetry.attempts.labels("failure", series.labels[1], "", "", "").inc()

    def chosen(self, decision: Decision) -> None:
        series, best = self.series(decision.request), decision.picked[0]
        self.telemetry.attempts.labels("success", series.labels[1], best.name, best.namespace, str(best.port)).inc()
        if decision.prediction is not None:
            p = decision.prediction
            series.predictions.observe(p.producer, p.ttft_ms / 1e3, p.tpot_ms / 1e3, p.took_s)
        self._observe_prefixes(decision)
        if self._disagg is not None:
            kind = DISAGG_DECISIONS.get(frozenset(stage.profile for stage in decision.stages), "prefill-decode")
            counter = self.telemetry.counter("disagg_decision_total")
            counter.labels(*self._disagg, series.labels[0], kind).inc()
        if self._decisions is not None:
            self._decisions.add(decision, time.time())

    def _observe_prefixes(self, decision: Decision) -> None:
        """How much of the prompt the chosen endpoint holds, by each index there is."""
        trace = decision.trace
        if trace is None or not decision.request.prompts:
            return
        for name, kind in self._indexes:
            match = trace.columns.get(f"prefix_match_blocks/{name}")
            total = trace.columns.get(f"prefix_total_blocks/{name}")
            if match is None or total is None or not total[trace.position]:
                continue
            blocks, size = match[trace.position], trace.columns[f"prefix_block_tokens/{name}"][trace.position]
            self._hit_ratio.labels(name, kind).observe(float(blocks / total[trace.position]))
            self._hit_bytes.labels(name, kind).observe(float(blocks * size * BYTES_PER_TOKEN))

    def ended(self, decision: Decision, outcome: Outcome, now_s: float) -> None:
        series, error = self.series(decision.request), _error(outcome)
        series.duration_s.observe(now_s - decision.at_s)
        if error:
            self.telemetry.errors.labels(*series.labels, error).inc()
        else:
            _measure(series, decision, outcome)
        self.tracer.ended(decision.ticket, error, {"http.response.status_code": outcome.status})
        if self._decisions is not None:
            self._decisions.finish(decision.ticket, outcome)
        if self._outcome_log is not None:
            self._outcome_log.info("%s", outcome_line(decision, outcome, now_s))


def _error(outcome: Outcome) -> str:
    """Empty when all went well."""
    if outcome.end is not End.FINISHED:
        return outcome.end.value
    return "ModelServerError" if outcome.status >= 400 else ""


def _measure(series: Series, decision: Decision, outcome: Outcome) -> None:
    for histogram, value in (
        (series.input_tokens, outcome.prompt_tokens or decision.request.input_tokens),
        (series.output_tokens, outcome.output_tokens),
        (series.cached_tokens, outcome.cached_tokens),
        (series.response_bytes, outcome.response_bytes),
    ):
        if value:
            histogram.observe(value)
    if outcome.e2e_ms is not None and outcome.output_tokens:
        series.ntpot_s.observe(outcome.e2e_ms / 1e3 / outcome.output_tokens)
    if outcome.ttft_ms is not None:
        series.ttft_s[outcome.streamed].observe(outcome.ttft_ms / 1e3)
    if outcome.tpot_ms is not None:
        series.tpot_s.observe(outcome.tpot_ms / 1e3)
    if decision.prediction is not None and outcome.streamed:
        plugin, request = decision.prediction.producer, decision.request
        for target, measured_ms, slo_ms in (
            ("ttft", outcome.ttft_ms, request.ttft_slo_ms),
            ("tpot", outcome.tpot_ms, request.tpot_slo_ms),
        ):
            if measured_ms is not None:
                series.predictions.measure(plugin, target, measured_ms, slo_ms)


def open_outcome_log(path: str) -> logging.Logger:
    """Appends to ``path``, which becomes ``path.1`` at OUTCOME_LOG_BYTES. Raises ConfigError when it cannot be."""
    try:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=OUTCOME_LOG_BYTES, backupCount=1)
    except OSError as e:
        raise ConfigError(f"cannot write the outcome log: {e.strerror}", path) from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.Logger("outcomes", logging.INFO)
    logger.addHandler(handler)
    return logger


def outcome_line(decision: Decision, outcome: Outcome, now_s: float) -> str:
    """One request as a JSON object: the decision's trace beside what became of it."""
    p = decision.prediction
    record: dict[str, Any] = {
        "time_s": round(time.time(), 3),
        "request_id": decision.request.id,
        "model": decision.request.target_model,
        "endpoint": decision.picked[0].key,
        "destination": decision.picked[0].hostport,
        "scores": {hostport: round(score, 4) for hostport, score in decision.scores.items()},
        "explored": decision.explored,
        "model_version": p.model_version if p else None,
        "predicted_ttft_ms": round(p.ttft_ms, 3) if p else None,
        "predicted_tpot_ms": round(p.tpot_ms, 3) if p else None,
        "predicted_ttft_quantiles_ms": [round(value, 3) for value in p.ttft_quantiles_ms] if p else None,
        "predicted_tpot_quantiles_ms": [round(value, 3) for value in p.tpot_quantiles_ms] if p else None,
        "end": outcome.end.value,
        "status": outcome.status,
        "ttft_ms": _rounded(outcome.ttft_ms),
        "tpot_ms": _rounded(outcome.tpot_ms),
        "e2e_ms": _rounded(outcome.e2e_ms),
        "input_tokens": decision.request.input_tokens,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": outcome.output_tokens,
        "open_s": round(now_s - decision.at_s, 4),
    }
    if decision.stages:
        record["stages"] = {stage.profile: stage.picked[0].key for stage in decision.stages}
    return msgspec.json.encode(record).decode()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
