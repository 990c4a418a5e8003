"""The spans of ``llmd_sched.tracing`` with the OpenTelemetry SDK."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llmd_sched.tracing import Attributes, Span, Timing, Tracer

SERVICE_NAME = "llm-d-epp"
MAX_OPEN = 10_000
"""Requests whose end a tracer waits for; beyond it the oldest ends as lost."""

CLOSE_WITHIN_S = 2.0
"""Spans not exported by then are given up."""

GROUPS = {"Filter": "filter_endpoints", "Scorer": "llm_d.epp.scoring", "Picker": "pick_endpoints"}
"""Extension point -> the span around its plugins; plugins of other points have none."""


class OtelTracer(Tracer):
    """Traces what the provider's sampler lets through. Used by one thread."""

    def __init__(self, provider: TracerProvider, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.open: dict[str, trace.Span] = {}
        """Ticket -> root span, oldest first."""
        self._provider = provider
        self._tracer = provider.get_tracer("llmd_sched")
        self._propagator = TraceContextTextMapPropagator()

    def request(self, headers: Mapping[str, str], attributes: Attributes | None = None) -> Span:
        parent = self._propagator.extract(headers)
        root = self._tracer.start_span("gateway.request", parent, trace.SpanKind.SERVER, attributes)
        below = trace.set_span_in_context(root)
        onward: dict[str, str] = {}
        self._propagator.inject(onward, below)
        if root.is_recording():
            return _Recorded(self, root, onward)
        propagated = Span()
        propagated.headers = onward
        return propagated

    def child(
        self, parent: trace.Span, name: str, start_ns: int | None, attributes: Attributes | None = None
    ) -> trace.Span:
        """Started at ``start_ns`` of the epoch, or now."""
        return self._tracer.start_span(
            name, trace.set_span_in_context(parent), attributes=attributes, start_time=start_ns
        )

    def follow(self, ticket: str, root: trace.Span) -> None:
        self.open[ticket] = root
        if len(self.open) > MAX_OPEN:
            self.ended(next(iter(self.open)), "lost")

    def ended(self, ticket: str, error: str = "", attributes: Attributes | None = None) -> None:
        root = self.open.pop(ticket, None)
        if root is not None:
            for name, value in (attributes or {}).items():
                root.set_attribute(name, value)
            _end(root, error)

    def close(self) -> None:
        for ticket in list(self.open):
            self.ended(ticket, "lost")
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_WITHIN_S)


class _Recorded(Span):
    """One request that is traced."""

    def __init__(self, tracer: OtelTracer, root: trace.Span, headers: Mapping[str, str]) -> None:
        self.headers = headers
        self._tracer, self._root = tracer, root
        self._epoch_ns = time.time_ns() - round(tracer.clock() * 1e9)
        self._orchestration = tracer.child(root, "gateway.request_orchestration", None)

    def profile(self, name: str, began_s: float, ended_s: float, timings: Sequence[Timing] = ()) -> None:
        attributes = {"llm_d.epp.profile.name": name}
        profile = self._tracer.child(self._orchestration, "run_scheduler_profile", self._ns(began_s), attributes)
        for point, group in GROUPS.items():
            plugins = [one for one in timings if one[0] == point]
            if plugins:
                self._group(profile, group, plugins, each=point == "Scorer")
        profile.end(self._ns(ended_s))

    def _group(self, profile: trace.Span, name: str, plugins: Sequence[Timing], *, each: bool) -> None:
        group = self._tracer.child(profile, name, self._ns(plugins[0][3]))
        for _, plugin_type, plugin, began_s, took_s in plugins if each else ():
            attributes = {"llm_d.epp.scorer.type": plugin_type, "llm_d.epp.scorer.name": plugin}
            one = self._tracer.child(group, f"llm_d.epp.scorer.{plugin_type}", self._ns(began_s), attributes)
            one.end(self._ns(began_s + took_s))
        _, _, _, began_s, took_s = plugins[-1]
        group.end(self._ns(began_s + took_s))

    def decided(self, ticket: str, attributes: Attributes | None = None) -> None:
        for name, value in (attributes or {}).items():
            self._root.set_attribute(name, value)
        self._orchestration.end()
        self._tracer.follow(ticket, self._root)

    def refused(self, code: str, status: int) -> None:
        if status:
            self._root.set_attribute("http.response.status_code", status)
        for span in (self._orchestration, self._root):
            _end(span, code)

    def _ns(self, at_s: float) -> int:
        return self._epoch_ns + round(at_s * 1e9)


def _end(span: trace.Span, error: str) -> None:
    if error:
        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR, error)
    span.end()


def exporting(environ: Mapping[str, str]) -> TracerProvider:
    """Spans are sent in batches by a thread of its own; what does not fit its queue is dropped."""
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": SERVICE_NAME})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
