"""The last decisions, for ``/debug/decisions``: where each request went, by what numbers, and what became of it.

Adding one keeps references to what the decision made anyway; JSON is made when somebody looks. What a record holds of
a request is listed here by name, so its prompt neither stays in memory nor gets out.
"""

from __future__ import annotations

import datetime
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from llmd_sched.types import Decision, Outcome, Trace

CAPACITY = 1000
MAX_BYTES = 64 << 20
RECORD_BYTES = 4096
"""Rough: a record with its names, prediction and outcome."""

SCORE_BYTES = 256
"""Rough: one candidate's score, once somebody has looked at it."""

NUMBER_BYTES = 8
"""Of a trace, which has one for each candidate, column and filter."""

MAX_NAME_CHARS = 256
"""Kept of what a client may choose: the request id, model and fairness id."""


class Record:
    """One decision. Only its outcome changes."""

    __slots__ = (
        "at", "bytes", "elsewhere", "explored", "fairness_id", "input_tokens", "max_output_tokens", "model", "outcome",
        "picked", "prediction", "priority", "request_id", "scores", "slo_ms", "stages", "streaming", "target_model",
        "ticket", "trace",
    )  # fmt: skip

    def __init__(self, decision: Decision, at: float) -> None:
        request = decision.request
        self.at = at
        self.ticket = decision.ticket
        self.request_id = request.id[:MAX_NAME_CHARS]
        self.model = request.model[:MAX_NAME_CHARS]
        self.target_model = request.target_model[:MAX_NAME_CHARS]
        self.fairness_id = request.fairness_id[:MAX_NAME_CHARS]
        self.priority = request.priority
        self.streaming = request.streaming
        self.input_tokens = request.input_tokens
        self.max_output_tokens = request.max_output_tokens
        self.slo_ms = request.ttft_slo_ms, request.tpot_slo_ms
        self.picked = decision.picked
        self.stages = decision.stages
        self.elsewhere = decision.elsewhere
        self.scores = decision.scores
        self.prediction = decision.prediction
        self.explored = decision.explored
        self.trace = decision.trace
        self.outcome: Outcome | None = None
        self.bytes = RECORD_BYTES + SCORE_BYTES * len(decision.scores) + _size(decision.trace)

    def went_to(self, endpoint: str) -> bool:
        """By ``namespace/name``, name or ``ip:port``."""
        best = self.picked[0]
        return endpoint in (best.key, best.name, best.hostport)

    def as_json(self) -> dict[str, Any]:
        ttft_slo_ms, tpot_slo_ms = self.slo_ms
        return {
            "ticket": self.ticket,
            "request_id": self.request_id,
            "time": datetime.datetime.fromtimestamp(self.at, datetime.UTC).isoformat(timespec="milliseconds"),
            "model": self.model,
            "target_model": self.target_model,
            "fairness_id": self.fairness_id,
            "priority": self.priority,
            "streaming": self.streaming,
            "input_tokens": self.input_tokens,
            "max_output_tokens": self.max_output_tokens,
            "ttft_slo_ms": ttft_slo_ms,
            "tpot_slo_ms": tpot_slo_ms,
            "endpoint": self.picked[0].key,
            "destination": self.elsewhere or self.picked[0].hostport,
            "fallbacks": [endpoint.hostport for endpoint in self.picked[1:]],
            "stages": {stage.profile: [endpoint.key for endpoint in stage.picked] for stage in self.stages},
            "explored": self.explored,
            "scores": {hostport: round(score, 4) for hostport, score in self.scores.items()},
            "prediction": self._prediction(),
            "trace": self._trace(),
            "outcome": _outcome(self.outcome),
        }

    def _prediction(self) -> dict[str, Any] | None:
        """Of the chosen endpoint; those of the others are the trace's."""
        p = self.prediction
        if p is None:
            return None
        return {
            "ttft_ms": round(p.ttft_ms, 3),
            "tpot_ms": round(p.tpot_ms, 3),
            "ttft_quantiles_ms": [round(value, 3) for value in p.ttft_quantiles_ms],
            "tpot_quantiles_ms": [round(value, 3) for value in p.tpot_quantiles_ms],
            "model_version": p.model_version,
            "producer": p.producer,
        }

    def _trace(self) -> Mapping[str, Any] | None:
        """A trace that cannot be told hides nothing else."""
        try:
            return self.trace.as_json() if self.trace else None
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def _size(trace: Trace | None) -> int:
    return NUMBER_BYTES * len(trace.endpoints) * (len(trace.columns) + len(trace.verdicts)) if trace else 0


def _outcome(outcome: Outcome | None) -> dict[str, Any] | None:
    """None while the request is open."""
    if outcome is None:
        return None
    return {
        "end": outcome.end.value,
        "status": outcome.status,
        "ttft_ms": outcome.ttft_ms,
        "tpot_ms": outcome.tpot_ms,
        "e2e_ms": outcome.e2e_ms,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": outcome.output_tokens,
        "streamed": outcome.streamed,
        "response_bytes": outcome.response_bytes,
    }


class Decisions:
    """At most ``capacity`` records of at most about ``max_bytes``; the oldest make room."""

    def __init__(self, capacity: int = CAPACITY, max_bytes: int = MAX_BYTES) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.bytes = 0
        self._records: OrderedDict[str, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, decision: Decision, at: float) -> None:
        """``at`` is the time of day, in seconds since 1970."""
        record = self._records[decision.ticket] = Record(decision, at)
        self.bytes += record.bytes
        while len(self._records) > self.capacity or self.bytes > self.max_bytes:
            self.bytes -= self._records.popitem(last=False)[1].bytes

    def finish(self, ticket: str, outcome: Outcome) -> None:
        """Of a decision that has made room meanwhile, nothing is kept."""
        record = self._records.get(ticket)
        if record is not None:
            record.outcome = outcome

    def newest(self, limit: int, endpoint: str | None = None, request_id: str | None = None) -> list[Record]:
        """Newest first, those that went to ``endpoint`` and had ``request_id``, where given."""
        return list(islice(self._matching(endpoint, request_id and request_id[:MAX_NAME_CHARS]), limit))

    def _matching(self, endpoint: str | None, request_id: str | None) -> Iterator[Record]:
        for record in reversed(self._records.values()):
            if (request_id is None or record.request_id == request_id) and (
                endpoint is None or record.went_to(endpoint)
            ):
                yield record
