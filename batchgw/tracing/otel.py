"""The spans of ``batchgw.tracing`` with the OpenTelemetry SDK."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from batchgw.records import Batch
from batchgw.tracing import LINES_AT_ONCE, NOT_TRACED, Attributes, Span, Tracer

SERVICE_NAME = "batchgw"
CLOSE_WITHIN_S = 2.0
"""Spans not exported by then are given up."""

SAMPLED = 1
LAST = {"completed": "finalize", "cancelled": "handle-cancelled", "expired": "handle-expired"}
"""What a batch's last span is called; of all other ends ``handle-failed``."""


class OtelTracer(Tracer):
    """Traces what the provider's sampler lets through; of lines at most ``lines_per_s`` on the long run."""

    def __init__(
        self, provider: TracerProvider, lines_per_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("batchgw")
        self._propagator = TraceContextTextMapPropagator()
        self._lines_per_s, self._clock = lines_per_s, clock
        self._credit, self._at_s = float(LINES_AT_ONCE), clock()

    def request(self, name: str, traceparent: str | None, tracestate: str | None) -> Span:
        carried = {"traceparent": traceparent or "", "tracestate": tracestate or ""}
        return self._started(name, self._propagator.extract(carried), SpanKind.SERVER)

    def line(self, trace: str | None, attributes: Attributes) -> Span:
        if trace is not None and not _sampled(trace):
            return NOT_TRACED
        if not self._allowed():
            return _Unsampled(trace) if trace else NOT_TRACED
        return self._started("http-request", self._within(trace), SpanKind.CLIENT, attributes)

    def batch_ended(self, batch: Batch, now_s: float) -> None:
        if batch.trace is not None and not _sampled(batch.trace):
            return
        parent, planned_s = self._within(batch.trace), batch.in_progress_s
        whole = self._past("process-batch", parent, batch.created_s, now_s, batch)
        if batch.trace is None:
            parent = trace.set_span_in_context(whole)
        self._past("ingest-and-plan", parent, batch.created_s, planned_s or now_s, batch)
        ending_s = batch.finalizing_s or batch.cancelling_s or min(batch.deadline_s, now_s)
        if planned_s is not None:
            self._past("execute-job", parent, planned_s, ending_s, batch)
        self._past(LAST.get(batch.status, "handle-failed"), parent, ending_s, now_s, batch)

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_WITHIN_S)

    def _started(self, name: str, parent: Context, kind: SpanKind, attributes: Attributes | None = None) -> Span:
        span = self._tracer.start_span(name, parent, kind, attributes)
        onward: dict[str, str] = {}
        self._propagator.inject(onward, trace.set_span_in_context(span, parent))
        return _Recorded(span, onward.get("traceparent"))

    def _past(self, name: str, parent: Context, began_s: float, ended_s: float, batch: Batch) -> trace.Span:
        span = self._tracer.start_span(name, parent, attributes=_attributes(batch), start_time=_ns(began_s))
        if batch.status == "failed":
            span.set_status(StatusCode.ERROR, batch.errors[0].code if batch.errors else "failed")
        span.end(_ns(max(began_s, ended_s)))
        return span

    def _within(self, traceparent: str | None) -> Context:
        return self._propagator.extract({"traceparent": traceparent or ""})

    def _allowed(self) -> bool:
        """Takes from the credit, which ``lines_per_s`` fills up."""
        now_s = self._clock()
        earned = self._lines_per_s * (now_s - self._at_s)
        self._credit, self._at_s = min(float(LINES_AT_ONCE), self._credit + earned), now_s
        if not self._lines_per_s or self._credit < 1:
            return False
        self._credit -= 1
        return True


class _Unsampled(Span):
    """Others learn of the trace, and that nothing of it is to be recorded."""

    def __init__(self, trace: str) -> None:
        self.traceparent = f"{trace[:-2]}{int(trace[-2:], 16) & ~SAMPLED:02x}"


class _Recorded(Span):
    def __init__(self, span: trace.Span, traceparent: str | None) -> None:
        self._span, self.traceparent, self.recorded = span, traceparent, span.is_recording()

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, attributes)

    def end(self, attributes: Attributes | None = None, error: str = "") -> None:
        for name, value in (attributes or {}).items():
            self._span.set_attribute(name, value)
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


def _sampled(traceparent: str) -> bool:
    return bool(int(traceparent[-2:], 16) & SAMPLED)


def _ns(at_s: float) -> int:
    return round(at_s * 1e9)


def _attributes(batch: Batch) -> dict[str, str | int | float | bool]:
    known: dict[str, str | int | float | bool] = {
        "batch.id": batch.id,
        "tenant.id": batch.tenant,
        "batch.status": batch.status,
        "batch.input_file.id": batch.input_file_id,
        "batch.request.total": batch.total,
        "batch.request.completed": batch.completed,
        "batch.request.failed": batch.failed,
        "gen_ai.usage.input_tokens": batch.usage.input_tokens,
        "gen_ai.usage.output_tokens": batch.usage.output_tokens,
    }
    files = ("batch.output_file.id", batch.output_file_id), ("batch.error_file.id", batch.error_file_id)
    return known | {name: id for name, id in files if id is not None}


def exporting(endpoint: str) -> TracerProvider:
    """Spans are sent in batches by a thread of its own; what does not fit its queue is dropped."""
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": SERVICE_NAME})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider
