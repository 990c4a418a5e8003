"""Spans of a request from times the driver took, and which tracer the environment asks for."""

from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from llmd_sched.tracing import NOT_TRACED, Tracer, otel, tracer
from llmd_sched.tracing.otel import OtelTracer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-2] + "00"
SOMEWHERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}

TIMINGS = [
    ("Filter", "decode-filter", "f", 10.001, 0.001),
    ("Filter", "by-label", "g", 10.002, 0.001),
    ("Scorer", "queue-scorer", "q", 10.003, 0.002),
    ("Scorer", "prefix-cache-scorer", "p", 10.005, 0.001),
    ("Picker", "max-score-picker", "m", 10.006, 0.001),
]


def sampled(traceparent: str) -> bool:
    """Whether its flags say so; another bit says that the id is random."""
    return bool(int(traceparent[-2:], 16) & 1)


class Traced:
    """A tracer on a clock that stands still, and what it exported."""

    def __init__(self, sampler: ParentBased | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler or ParentBased(ALWAYS_ON), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = OtelTracer(provider, clock=lambda: 10.0)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def parent_of(self, name: str) -> str | None:
        parent = self.spans[name].parent
        names = {one.context.span_id: one.name for one in self.spans.values()}
        return None if parent is None else names.get(parent.span_id, "elsewhere")


@pytest.fixture
def traced() -> Traced:
    return Traced()


def test_a_request_is_a_tree_of_spans(traced: Traced) -> None:
    span = traced.tracer.request({}, {"gen_ai.request.model": "m"})
    span.profile("default", 10.001, 10.008, TIMINGS)
    span.decided("t1", {"llm_d.epp.endpoint": "ns/e0"})
    traced.tracer.ended("t1", attributes={"http.response.status_code": 200})
    assert {name: traced.parent_of(name) for name in traced.spans} == {
        "gateway.request": None,
        "gateway.request_orchestration": "gateway.request",
        "run_scheduler_profile": "gateway.request_orchestration",
        "filter_endpoints": "run_scheduler_profile",
        "llm_d.epp.scoring": "run_scheduler_profile",
        "llm_d.epp.scorer.queue-scorer": "llm_d.epp.scoring",
        "llm_d.epp.scorer.prefix-cache-scorer": "llm_d.epp.scoring",
        "pick_endpoints": "run_scheduler_profile",
    }
    root = traced.spans["gateway.request"]
    assert root.kind is SpanKind.SERVER
    assert root.status.status_code is StatusCode.UNSET
    assert dict(root.attributes) == {
        "gen_ai.request.model": "m",
        "llm_d.epp.endpoint": "ns/e0",
        "http.response.status_code": 200,
    }


def test_spans_have_the_times_they_are_told(traced: Traced) -> None:
    span = traced.tracer.request({})
    span.profile("default", 10.001, 10.008, TIMINGS)
    spans = traced.spans
    began_ns = spans["run_scheduler_profile"].start_time
    for name, start_ms, length_ms in (
        ("run_scheduler_profile", 0, 7),
        ("filter_endpoints", 0, 2),
        ("llm_d.epp.scoring", 2, 3),
        ("llm_d.epp.scorer.queue-scorer", 2, 2),
        ("pick_endpoints", 5, 1),
    ):
        one = spans[name]
        assert one.start_time - began_ns == pytest.approx(start_ms * 1e6, abs=10), name
        assert one.end_time - one.start_time == pytest.approx(length_ms * 1e6, abs=10), name


def test_without_timings_a_profile_is_one_span(traced: Traced) -> None:
    span = traced.tracer.request({})
    span.profile("prefill", 10.0, 10.1)
    span.profile("decode", 10.1, 10.2)
    finished = traced.exporter.get_finished_spans()
    assert [one.attributes["llm_d.epp.profile.name"] for one in finished] == ["prefill", "decode"]


def test_the_root_ends_with_the_request(traced: Traced) -> None:
    traced.tracer.request({}).decided("t1")
    assert set(traced.spans) == {"gateway.request_orchestration"}
    traced.tracer.ended("another")
    assert set(traced.tracer.open) == {"t1"}
    traced.tracer.ended("t1", "aborted")
    root = traced.spans["gateway.request"]
    assert (root.status.status_code, root.attributes["error.type"]) == (StatusCode.ERROR, "aborted")
    traced.tracer.ended("t1")
    assert len(traced.exporter.get_finished_spans()) == 2


@pytest.mark.parametrize(("status", "attribute"), [(429, 429), (0, None)])
def test_a_refusal_ends_everything_in_error(traced: Traced, status: int, attribute: int | None) -> None:
    traced.tracer.request({}).refused("ResourceExhausted", status)
    assert {one.status.status_code for one in traced.spans.values()} == {StatusCode.ERROR}
    assert set(traced.spans) == {"gateway.request", "gateway.request_orchestration"}
    assert traced.spans["gateway.request"].attributes.get("http.response.status_code") == attribute
    assert not traced.tracer.open


def test_the_clients_span_is_the_parent_and_ours_goes_upstream(traced: Traced) -> None:
    span = traced.tracer.request({"traceparent": PARENT, "tracestate": "vendor=1"})
    span.decided("t")
    traced.tracer.ended("t")
    root = traced.spans["gateway.request"]
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert span.headers == {
        "traceparent": f"00-{root.context.trace_id:032x}-{root.context.span_id:016x}-01",
        "tracestate": "vendor=1",
    }


@pytest.mark.parametrize("header", ["", "nonsense", PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32)])
def test_an_unusable_traceparent_begins_a_trace(traced: Traced, header: str) -> None:
    assert sampled(traced.tracer.request({"traceparent": header}).headers["traceparent"])


@pytest.mark.parametrize(
    ("sampler", "headers"), [(ParentBased(ALWAYS_OFF), {}), (ParentBased(ALWAYS_ON), {"traceparent": UNSAMPLED})]
)
def test_what_is_not_sampled_is_passed_on_and_not_recorded(sampler: ParentBased, headers: dict[str, str]) -> None:
    traced = Traced(sampler)
    span = traced.tracer.request(headers)
    span.profile("default", 1.0, 2.0, TIMINGS)
    span.decided("t")
    assert not traced.tracer.open
    assert traced.spans == {}
    assert not sampled(span.headers["traceparent"])
    if headers:
        assert span.headers["traceparent"].split("-")[1] == UNSAMPLED.split("-")[1]


def test_requests_whose_end_never_comes_are_bounded(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "MAX_OPEN", 2)
    for ticket in "abc":
        traced.tracer.request({}).decided(ticket)
    assert list(traced.tracer.open) == ["b", "c"]
    assert traced.spans["gateway.request"].attributes["error.type"] == "lost"


def test_closing_ends_and_exports_what_is_open(traced: Traced) -> None:
    traced.tracer.request({}).decided("t")
    traced.tracer.close()
    assert traced.spans["gateway.request"].attributes["error.type"] == "lost"


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, True),
        (SOMEWHERE, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, True),
        ({**SOMEWHERE, "OTEL_SDK_DISABLED": "True"}, True),
        ({**SOMEWHERE, "OTEL_TRACES_EXPORTER": "none"}, True),
    ],
)
def test_without_somewhere_to_export_to_nothing_is_traced(environ: dict[str, str], wanted: bool) -> None:
    made = tracer(environ, wanted=wanted)
    assert type(made) is Tracer
    span = made.request({"traceparent": PARENT})
    assert span is NOT_TRACED
    assert span.headers == {}
    span.profile("p", 1.0, 2.0)
    span.decided("t")
    span.refused("c", 500)
    made.ended("t", "aborted")
    made.close()


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp and none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "grpc"),
    ],
)
def test_what_we_do_not_speak_is_refused(variable: str, value: str, accepted: str) -> None:
    with pytest.raises(ValueError, match=f"{value}.*accepted.*{accepted}"):
        tracer({**SOMEWHERE, variable: value})


def test_without_the_extra_there_is_a_warning_and_no_tracing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("llmd_sched.tracing.otel")
    monkeypatch.setitem(sys.modules, "llmd_sched.tracing.otel", None)
    assert type(tracer(SOMEWHERE)) is Tracer
    assert "llmd-sched[otel]" in caplog.text


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "llm-d-epp"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs"}, "theirs"),
    ],
)
def test_the_service_has_a_name_unless_told(
    environ: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {**SOMEWHERE, "OTEL_TRACES_SAMPLER": "always_off", **environ}.items():
        monkeypatch.setenv(variable, value)
    provider = otel.exporting(environ)
    made = OtelTracer(provider)
    assert provider.resource.attributes["service.name"] == name
    assert not sampled(made.request({}).headers["traceparent"])
    made.close()
