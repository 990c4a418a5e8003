"""OpenTelemetry spans of a request, made after the fact from times the driver took, so that code which decides knows
nothing of them. Times are seconds on the tracer's clock.

    gateway.request                           server; until the end of the reply
    └── gateway.request_orchestration         until the choice, or the refusal
        └── run_scheduler_profile             one per profile
            ├── filter_endpoints              from here on with timings only
            ├── llm_d.epp.scoring
            │   └── llm_d.epp.scorer.<type>
            └── pick_endpoints

``Tracer`` and ``Span`` do nothing: they are what runs when nobody asked for traces. The ones that do are in ``otel``,
which needs the extra of that name and is imported when ``tracer`` finds an endpoint to export to.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

Attributes = Mapping[str, str | int | float | bool]

Timing = tuple[str, str, str, float, float]
"""Extension point (``Filter``, ``Scorer``, ``Picker``), plugin type, plugin name, began_s, took_s."""


class Span:
    """One request, not traced."""

    headers: Mapping[str, str] = {}
    """To set on the request sent upstream, in place of the client's: ``traceparent`` and, if any, ``tracestate``."""

    def profile(self, name: str, began_s: float, ended_s: float, timings: Sequence[Timing] = ()) -> None:
        """A profile has run; ``timings`` of its plugins, in the order they ran, if anybody took them."""

    def decided(self, ticket: str, attributes: Attributes | None = None) -> None:
        """The choice is made; ``Tracer.ended`` will be told of this ticket."""

    def refused(self, code: str, status: int) -> None:
        """Answered at once with an error, or given up (``status`` 0); nothing more follows."""


NOT_TRACED = Span()


class Tracer:
    """Traces nothing."""

    def request(self, headers: Mapping[str, str], attributes: Attributes | None = None) -> Span:
        """A request has arrived; ``headers`` in lower case may name the span it belongs to."""
        return NOT_TRACED

    def ended(self, ticket: str, error: str = "", attributes: Attributes | None = None) -> None:
        """What was decided under this ticket is over; with ``error`` empty, well. Unknown tickets are ignored."""

    def close(self) -> None:
        """Export what there is; blocks for two seconds at most."""


def tracer(environ: Mapping[str, str], *, wanted: bool = True) -> Tracer:
    """The tracer that the standard variables ask for. Call it after the last fork.

    Read here: the endpoints, OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER, OTEL_SERVICE_NAME; the SDK reads the rest of
    OTEL_EXPORTER_OTLP_*, OTEL_TRACES_SAMPLER(_ARG), OTEL_RESOURCE_ATTRIBUTES and OTEL_BSP_*, whose queue is 2048
    spans unless told. Raises ValueError for a protocol or an exporter we have not.
    """
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporter = environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if not wanted or disabled or exporter == "none" or not _first(environ, ENDPOINTS):
        return Tracer()
    if exporter != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER is {exporter!r}; accepted are otlp and none")
    protocol = _first(environ, PROTOCOLS) or "grpc"
    if protocol != "grpc":
        raise ValueError(f"{' or '.join(PROTOCOLS)} is {protocol!r}; accepted is grpc")
    try:
        from llmd_sched.tracing import otel
    except ImportError:
        log.warning("no traces, although an endpoint is configured: install llmd-sched[otel]")
        return Tracer()
    return otel.OtelTracer(otel.exporting(environ))


def _first(environ: Mapping[str, str], names: Sequence[str]) -> str:
    return next((environ[name] for name in names if environ.get(name)), "")
