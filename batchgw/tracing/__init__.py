"""OpenTelemetry spans of a batch, from the request that creates it to its end. All but those of the API and of
lines are made when the batch has ended, from the times in its row: they are whole whichever processes died on the way.

    POST /v1/batches              server; continues the client's trace, and goes with the batch
    ├── process-batch             from its creation to its end
    ├── ingest-and-plan
    ├── execute-job
    ├── http-request              client; one for each line that is sampled; engine and router join here
    └── finalize                  or handle-cancelled, handle-expired, handle-failed

``Tracer`` and ``Span`` do nothing: they are what runs when nobody asked for traces. The ones that do are in ``otel``,
which needs the extra of that name and is imported when there is an endpoint to export to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import msgspec

from batchgw.records import Batch

LINES_AT_ONCE = 100
"""Lines whose spans may be recorded before ``lines_per_s`` counts: a small batch has all of its lines."""

Attributes = Mapping[str, str | int | float | bool]


class TracingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """``endpoint`` takes OTLP over gRPC (``http://collector:4317``). ``lines_per_s`` lines of one process have a span;
    the others are not recorded by router and engine either. The rest (headers, sampler, resource) is told by
    OpenTelemetry's variables of the environment, OTEL_*."""

    endpoint: str
    lines_per_s: float = 10.0

    def check(self) -> None:
        if not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint must begin with http:// or https://, not {self.endpoint!r}")
        if self.lines_per_s < 0:
            raise ValueError("linesPerS must not be negative")
        if not installed():
            raise ValueError("needs OpenTelemetry: install the extra otel")


class Span:
    """Not recorded. ``traceparent`` is to go on with what is asked of others; None leaves theirs as it is."""

    traceparent: str | None = None
    recorded = False

    def event(self, name: str, attributes: Attributes | None = None) -> None: ...

    def end(self, attributes: Attributes | None = None, error: str = "") -> None:
        """It is over; with ``error`` empty, well."""


NOT_TRACED = Span()


class Tracer:
    """Traces nothing."""

    def request(self, name: str, traceparent: str | None, tracestate: str | None) -> Span:
        """A request to the API has arrived, perhaps within a trace of the client's."""
        return NOT_TRACED

    def line(self, trace: str | None, attributes: Attributes) -> Span:
        """A line is to be sent; ``trace`` is its batch's."""
        return NOT_TRACED

    def batch_ended(self, batch: Batch, now_s: float) -> None: ...

    def close(self) -> None:
        """Exports what there is; blocks for two seconds at most."""


def tracer(settings: TracingSettings | None) -> Tracer:
    """Raises ImportError where ``check`` would have complained."""
    if settings is None:
        return Tracer()
    from batchgw.tracing import otel

    return otel.OtelTracer(otel.exporting(settings.endpoint), settings.lines_per_s)


def installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc.trace_exporter") is not None
    except ImportError:
        return False
