"""A batch's trace, from the request that creates it over its lines to its end; and that it costs nothing when off."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import Receive, Scope, Send

from batchgw.api.traced import Traced
from batchgw.config import load
from batchgw.errors import ConfigError
from batchgw.records import Batch, LineError
from batchgw.tracing import LINES_AT_ONCE, NOT_TRACED, Tracer, TracingSettings, otel, tracer
from batchgw.tracing.otel import OtelTracer

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, SPAN = CLIENT.split("-")[1:3]
UNSAMPLED = CLIENT[:-2] + "00"
LINE = {"batch.id": "batch_1", "batch.line": 3}


class Traces:
    """A tracer on a clock that stands still until told, and what it exported."""

    def __init__(self, lines_per_s: float = 10.0) -> None:
        self.now_s = 0.0
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = OtelTracer(provider, lines_per_s, clock=lambda: self.now_s)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def parent_of(self, name: str) -> str:
        parent = self.spans[name].parent
        return "" if parent is None else f"{parent.span_id:016x}"


@pytest.fixture
def traces() -> Traces:
    return Traces()


def batch(**fields: Any) -> Batch:
    return Batch(
        **{
            "id": "batch_1", "tenant": "t", "endpoint": "/v1/chat/completions", "input_file_id": "file-1",
            "completion_window": "1h", "created_s": 100.0, "deadline_s": 3700.0, "status": "completed", "total": 9,
            "completed": 8, "failed": 1, "in_progress_s": 101.0, "finalizing_s": 150.0, "output_file_id": "file-2",
            "trace": CLIENT, **fields,
        }
    )  # fmt: skip


# The API


async def seen_by_the_app(traces: Traces, method: str, path: str, status: int, **headers: str) -> dict[str, str]:
    """The headers that reach what is behind the middleware."""
    found: dict[str, str] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.update({key.decode(): value.decode() for key, value in scope["headers"]})
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx2.ASGITransport(app=Traced(app, traces.tracer))
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        await client.request(method, path, headers=headers)
    return found


async def test_the_request_that_creates_a_batch_continues_the_clients_trace(traces: Traces) -> None:
    passed = await seen_by_the_app(traces, "POST", "/v1/batches", 200, traceparent=CLIENT, tracestate="vendor=1")
    span = traces.spans["POST /v1/batches"]
    assert (span.kind, traces.parent_of(span.name)) == (SpanKind.SERVER, SPAN)
    assert passed["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert dict(span.attributes or {}) == {"http.response.status_code": 200}


async def test_without_a_clients_trace_a_batch_begins_one(traces: Traces) -> None:
    passed = await seen_by_the_app(traces, "POST", "/v1/batches", 503)
    span = traces.spans["POST /v1/batches"]
    assert passed["traceparent"].split("-")[1] == f"{span.context.trace_id:032x}"
    assert (traces.parent_of(span.name), span.status.status_code) == ("", StatusCode.ERROR)


@pytest.mark.parametrize(
    ("method", "path", "headers", "name"),
    [
        ("GET", "/v1/batches/batch_1", {}, None),  # who polls makes no traces
        ("GET", "/health", {}, None),
        ("GET", "/v1/files/file-1/content", {"traceparent": CLIENT}, "GET /v1/files/{file_id}/content"),
        ("POST", "/v1/files", {"traceparent": CLIENT}, "POST /v1/files"),
    ],
)
async def test_other_requests_have_a_span_only_within_a_trace(
    traces: Traces, method: str, path: str, headers: dict[str, str], name: str | None
) -> None:
    await seen_by_the_app(traces, method, path, 200, **headers)
    assert list(traces.spans) == ([name] if name else [])


async def test_what_the_client_does_not_sample_is_passed_on_and_not_recorded(traces: Traces) -> None:
    passed = await seen_by_the_app(traces, "POST", "/v1/batches", 200, traceparent=UNSAMPLED)
    flags = int(passed["traceparent"][-2:], 16)
    assert (passed["traceparent"].split("-")[1], flags & 1, traces.spans) == (TRACE, 0, {})
    assert traces.tracer.line(passed["traceparent"], LINE) is NOT_TRACED
    traces.tracer.batch_ended(batch(trace=passed["traceparent"]), 200.0)
    assert not traces.spans


# Lines


def test_a_line_is_a_span_of_its_batch_and_what_goes_out_names_it(traces: Traces) -> None:
    span = traces.tracer.line(CLIENT, LINE)
    span.event("attempt over", {"http.response.status_code": 503})
    span.end({"gen_ai.usage.output_tokens": 5})
    done = traces.spans["http-request"]
    assert span.traceparent == f"00-{TRACE}-{done.context.span_id:016x}-01"
    assert (done.kind, traces.parent_of("http-request")) == (SpanKind.CLIENT, SPAN)
    assert dict(done.attributes or {}) == {**LINE, "gen_ai.usage.output_tokens": 5}
    assert [event.name for event in done.events] == ["attempt over"]


def recorded(traces: Traces, lines: int, trace: str | None = CLIENT) -> int:
    return sum(traces.tracer.line(trace, LINE).recorded for _ in range(lines))


def test_of_many_lines_a_few_a_second_are_recorded(traces: Traces) -> None:
    assert recorded(traces, 1000) == LINES_AT_ONCE
    traces.now_s = 2.5
    assert recorded(traces, 1000) == 25
    traces.now_s = 1e6
    assert recorded(traces, 1000) == LINES_AT_ONCE


def test_lines_beyond_the_limit_are_not_recorded_by_others_either() -> None:
    traces = Traces(lines_per_s=0.0)
    assert traces.tracer.line(CLIENT, LINE).traceparent == UNSAMPLED
    assert traces.tracer.line(None, LINE) is NOT_TRACED


def test_a_line_whose_batch_has_no_trace_begins_one(traces: Traces) -> None:
    traces.tracer.line(None, LINE).end()
    assert traces.parent_of("http-request") == ""


# The end


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {},
            {"process-batch": (100, 160), "ingest-and-plan": (100, 101), "execute-job": (101, 150),
             "finalize": (150, 160)},
        ),
        (
            {"status": "cancelled", "finalizing_s": None, "cancelling_s": 140.0},
            {"process-batch": (100, 160), "ingest-and-plan": (100, 101), "execute-job": (101, 140),
             "handle-cancelled": (140, 160)},
        ),
        (
            {"status": "expired", "finalizing_s": None, "deadline_s": 155.0},
            {"process-batch": (100, 160), "ingest-and-plan": (100, 101), "execute-job": (101, 155),
             "handle-expired": (155, 160)},
        ),
        (
            {"status": "failed", "finalizing_s": None, "in_progress_s": None},
            {"process-batch": (100, 160), "ingest-and-plan": (100, 160), "handle-failed": (160, 160)},
        ),
    ],
)  # fmt: skip
def test_an_ended_batch_is_told_by_the_times_of_its_row(
    traces: Traces, fields: dict[str, Any], expected: dict[str, tuple[float, float]]
) -> None:
    traces.tracer.batch_ended(batch(**fields), 160.0)
    found = {name: (span.start_time or 0, span.end_time or 0) for name, span in traces.spans.items()}
    assert {name: (start / 1e9, end / 1e9) for name, (start, end) in found.items()} == expected
    assert {traces.parent_of(name) for name in found} == {SPAN}


def test_its_spans_say_which_batch_and_a_failed_one_why(traces: Traces) -> None:
    failed = batch(status="failed", errors=(LineError("url_mismatch", "no"),))
    traces.tracer.batch_ended(failed, 160.0)
    span = traces.spans["process-batch"]
    told = dict(span.attributes or {})
    assert (told["batch.id"], told["tenant.id"], told["batch.output_file.id"]) == ("batch_1", "t", "file-2")
    assert (told["batch.request.total"], told["batch.request.completed"], told["batch.request.failed"]) == (9, 8, 1)
    assert "batch.error_file.id" not in told
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "url_mismatch")


# Settings, and nothing at all


def test_without_settings_nothing_is_traced() -> None:
    made = tracer(None)
    assert type(made) is Tracer
    span = made.request("POST /v1/batches", CLIENT, None)
    assert (span, span.traceparent, made.line(CLIENT, LINE)) == (NOT_TRACED, None, NOT_TRACED)
    span.event("e")
    span.end({}, "error")
    made.batch_ended(batch(), 160.0)
    made.close()


def test_off_means_that_no_sdk_and_no_exporter_is_imported() -> None:
    code = """
import sys
from batchgw.__main__ import main
from batchgw.app.parts import Batching
from batchgw.tracing import tracer
tracer(None)
ours = ("opentelemetry.sdk", "opentelemetry.exporter", "grpc", "batchgw.tracing.otel")
print([name for name in sys.modules if name.startswith(ours)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("written", "path", "message"),
    [
        ("tracing: {endpoint: 'collector:4317'}", "$.tracing", "http://"),
        ("tracing: {endpoint: 'http://c:4317', linesPerS: -1}", "$.tracing", "linesPerS"),
        ("tracing: {}", "$.tracing", "endpoint"),
        ("tracing: {endpoint: 'http://c:4317', rate: 1}", "$.tracing", "accepted: endpoint, linesPerS"),
    ],
)
def test_settings_that_cannot_be_are_refused(written: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(written, {})
    assert path in str(raised.value)
    assert message in str(raised.value)


def test_without_the_extra_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgw.tracing.installed", lambda: False)
    with pytest.raises(ConfigError, match="extra otel"):
        load("tracing: {endpoint: 'http://c:4317'}", {})


@pytest.mark.parametrize(
    ("environ", "name"),
    [({}, "batchgw"), ({"OTEL_SERVICE_NAME": "mine"}, "mine"), ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=x"}, "x")],
)
def test_the_service_has_a_name_unless_told(
    environ: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {"OTEL_TRACES_SAMPLER": "always_off", **environ}.items():
        monkeypatch.setenv(variable, value)
    provider = otel.exporting("http://127.0.0.1:1")
    made = OtelTracer(provider, 10.0)
    assert provider.resource.attributes["service.name"] == name
    assert not made.line(None, LINE).recorded
    made.close()


def test_settings_make_the_tracer_that_exports() -> None:
    made = tracer(TracingSettings(endpoint="http://127.0.0.1:1"))
    assert isinstance(made, OtelTracer)
    made.close()


def test_batches_of_older_rows_have_a_trace_of_their_own(traces: Traces) -> None:
    traces.tracer.batch_ended(replace(batch(), trace=None), 160.0)
    root = traces.spans["process-batch"]
    assert traces.parent_of("process-batch") == ""
    assert {traces.parent_of(name) for name in traces.spans if name != root.name} == {f"{root.context.span_id:016x}"}
