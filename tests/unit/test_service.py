"""Headers and body to a Request, its choice and its end: what both data paths share."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llmd_sched import config as configs
from llmd_sched.catalog import build_parsers, build_router, resolve
from llmd_sched.errors import BadRequest, NoCandidates, NoEndpoints, UnsupportedMode
from llmd_sched.extproc.observer import Observer, outcome_line
from llmd_sched.extproc.service import EndpointPicker
from llmd_sched.extproc.session import Route
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.telemetry import Telemetry
from llmd_sched.tracing import Attributes, Span, Timing, Tracer
from llmd_sched.types import Decision, End, Endpoint, Outcome, Prediction, Request

PODS = [Endpoint(name=f"pod-{i}", address=f"10.0.0.{i + 1}", port=8000) for i in range(2)]
BODY = {"model": "m", "prompt": "twelve bytes", "max_tokens": 9, "stream": True}

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
PASSTHROUGH = HEAD + "plugins: [{type: queue-scorer}]\nrequestHandler: {parsers: [{pluginRef: passthrough-parser}]}\n"
OPENAI_ONLY = HEAD + "plugins: [{type: queue-scorer}]\nrequestHandler: {parsers: [{pluginRef: openai-parser}]}\n"


class Clock:
    """Time stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Picker:
    """An EndpointPicker over two idle endpoints, and ways to look at it."""

    def __init__(self, text: str = configs.DEFAULT_CONFIG, pods: list[Endpoint] | None = None) -> None:
        resolved = resolve(configs.load(text))
        self.clock = Clock()
        pool = Pool(stale_after_s=1e9)
        pool.apply(PODS if pods is None else pods)
        for pod in pool.endpoints:
            pool.record(pod, Load(waiting=0.0, running=0.0, kv_usage=0.0), self.clock())
        self.router = build_router(resolved, pool, Random(1))
        self.registry = CollectorRegistry()
        self.log = logging.Logger("outcomes", logging.INFO)
        self.lines = Lines()
        self.log.addHandler(self.lines)
        self.service = EndpointPicker(
            self.router,
            build_parsers(resolved),
            Observer(Telemetry(self.registry), outcome_log=self.log),
            clock=self.clock,
        )

    def route(
        self, body: Any = BODY, headers: dict[str, str] | None = None, subset: frozenset[str] | None = None
    ) -> Any:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {":path": "/v1/completions", "x-request-id": "r-1"} if headers is None else headers
        return asyncio.run(self.service.route(Route(fields, raw, subset), raw))

    def request(self, body: Any = BODY, **headers: str) -> Request:
        """The request as it is understood; ``x_slo_ttft_ms="5"`` becomes a header."""
        fields = {":path": "/v1/completions"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return self.route(body, fields).decision.request

    def sample(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name that have at least these labels."""
        samples = [s for m in self.registry.collect() for s in m.samples if s.name == f"llm_d_epp_{name}"]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())


@pytest.fixture
def picker() -> Picker:
    return Picker()


# --- headers ----------------------------------------------------------------------------------------------------------

HEADERS = [
    ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id", "fairness_id", "a", "b", "a", "b"),
    ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite", "target_model", "a", "b", "a", "b"),
    ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms", "ttft_slo_ms", "12.5", "70", 12.5, 70.0),
    ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms", "tpot_slo_ms", "12.5", "70", 12.5, 70.0),
]


@pytest.mark.parametrize(("canonical", "alias", "field", "first", "second", "as_first", "as_second"), HEADERS)
def test_a_header_has_an_old_name_and_the_new_one_wins(
    picker: Picker, canonical: str, alias: str, field: str, first: str, second: str, as_first: Any, as_second: Any
) -> None:
    assert getattr(picker.request(**{canonical: first}), field) == as_first
    assert getattr(picker.request(**{alias: second}), field) == as_second
    assert getattr(picker.request(**{alias: second, canonical: first}), field) == as_first
    assert getattr(picker.request(**{canonical: first, alias: second}), field) == as_first


def test_without_headers_a_request_has_defaults_and_an_id_of_its_own(picker: Picker) -> None:
    first, second = picker.request(), picker.request()
    assert first.id
    assert first.id != second.id
    assert (first.fairness_id, first.ttft_slo_ms, first.tpot_slo_ms) == ("default-flow", None, None)
    assert (first.model, first.target_model) == ("m", "m")
    assert (first.max_output_tokens, first.streaming, first.input_tokens) == (9, True, 3)


def test_the_clients_request_id_is_kept(picker: Picker) -> None:
    assert picker.request(x_request_id="from-the-client").id == "from-the-client"


def test_two_requests_of_one_id_are_two_requests(picker: Picker) -> None:
    first, second = (picker.route(headers={"x-request-id": "same"}).decision for _ in range(2))
    assert first.ticket != second.ticket
    assert len(picker.router.open) == 2


@pytest.mark.parametrize(("text", "ms"), [("100", 100.0), ("0.5", 0.5), ("1e3", 1000.0), ("86400000", 86_400_000.0)])
def test_an_slo_is_a_number_of_milliseconds(picker: Picker, text: str, ms: float) -> None:
    request = picker.request(x_llm_d_slo_ttft_ms=text, x_llm_d_slo_tpot_ms=text)
    assert (request.ttft_slo_ms, request.tpot_slo_ms) == (ms, ms)
    assert picker.sample("ignored_header_total") == 0


@pytest.mark.parametrize(
    "text",
    ["nan", "NaN", "inf", "-inf", "Infinity", "1e999", "-1", "0", "-0.0", "86400001", "1e300", "fast", "1,5", "10ms"],
)
@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("x-llm-d-slo-ttft-ms", "x-llm-d-slo-ttft-ms"),
        ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms"),
        ("x-llm-d-slo-tpot-ms", "x-llm-d-slo-tpot-ms"),
        ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms"),
    ],
)
def test_an_absurd_slo_is_no_slo_and_is_counted(picker: Picker, text: str, name: str, counted: str) -> None:
    request = picker.request(**{name: text})
    assert (request.ttft_slo_ms, request.tpot_slo_ms) == (None, None)
    assert picker.sample("ignored_header_total", header=counted) == 1
    assert picker.sample("ignored_header_total") == 1


def test_an_empty_slo_is_no_slo(picker: Picker) -> None:
    assert picker.request(x_llm_d_slo_ttft_ms="").ttft_slo_ms is None


# --- model ------------------------------------------------------------------------------------------------------------


def test_a_body_that_is_not_rewritten_keeps_its_very_bytes(picker: Picker) -> None:
    raw = b'{ "prompt":"\\u00e9 <&>", "model" : "m","n": 12345678901234567890 }'
    assert picker.route(raw)[1:3] == (raw, False)
    same = {"x-llm-d-model-name-rewrite": "m", ":path": "/v1/completions"}
    assert picker.route(raw, same)[1:3] == (raw, False)


@pytest.mark.parametrize("name", ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"])
def test_the_rewrite_header_names_the_model_upstream(picker: Picker, name: str) -> None:
    raw = b'{"prompt":"\\u00e9 <&>","model":"m","n":12345678901234567890}'
    decision, body, changed = picker.route(raw, {":path": "/v1/completions", name: 'it"s'})[:3]
    assert changed
    assert body == b'{"prompt":"\\u00e9 <&>","model":"it\\"s","n":12345678901234567890}'
    assert (decision.request.model, decision.request.target_model) == ("m", 'it"s')
    assert picker.sample("request_total", model_name="m", target_model_name='it"s') == 1


def test_the_rewrite_header_gives_a_model_to_a_body_that_has_none(picker: Picker) -> None:
    decision, body, changed = picker.route({"prompt": "p"}, {"x-llm-d-model-name-rewrite": "m"})[:3]
    assert changed
    assert json.loads(body) == {"prompt": "p", "model": "m"}
    assert (decision.request.model, decision.request.target_model) == ("", "m")


@pytest.mark.parametrize("body", [{"prompt": "p"}, {"prompt": "p", "model": ""}])
def test_a_request_without_a_model_is_bad(picker: Picker, body: dict[str, str]) -> None:
    with pytest.raises(BadRequest) as refused:
        picker.route(body)
    assert refused.value.body == "inference error: BadRequest - model not found in request body"
    assert not picker.router.open


@pytest.mark.parametrize("raw", [b"", b"nonsense", b"[]", b"{", b'{"model": 3, "prompt": "p"}', b"\xff", b'"text"'])
def test_a_body_that_is_no_request_is_bad(picker: Picker, raw: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        picker.route(raw)
    assert refused.value.body.startswith("inference error: BadRequest - error unmarshaling request bodyMap: ")
    assert not picker.router.open


def test_the_passthrough_parser_knows_no_model_and_changes_nothing() -> None:
    picker = Picker(PASSTHROUGH)
    headers = {":path": "/v1/completions", "x-llm-d-model-name-rewrite": "other"}
    decision, body, changed = picker.route(b"no JSON", headers)[:3]
    assert (body, changed) == (b"no JSON", False)
    assert decision.request.model == ""
    assert picker.sample("request_total", model_name="", priority="0") == 1


# --- path -------------------------------------------------------------------------------------------------------------

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    "headers",
    [
        {":path": "/v1/chat/completions"},
        {":path": "/v1/chat/completions?beta=1&next=/v1/completions"},
        {":path": "/tenant/a/v1/chat/completions"},
        {"x-original-path": "/v1/chat/completions"},
        {"x-original-path": "/v1/chat/completions?beta=1"},
        {"x-forwarded-path": "/v1/chat/completions"},
        {"x-original-path": "/v1/chat/completions", "x-forwarded-path": "/v1/completions"},
        {":path": "/v1/chat/completions", "x-original-path": "/v1/completions", "x-forwarded-path": "/v1/completions"},
    ],
)
def test_the_path_chooses_the_parser(picker: Picker, headers: dict[str, str]) -> None:
    assert picker.route(CHAT, headers).decision.request.prompts == (b"userhello",)


@pytest.mark.parametrize("headers", [{}, {":path": ""}, {":path": "?x=1"}])
def test_without_a_path_it_is_a_completion(picker: Picker, headers: dict[str, str]) -> None:
    assert picker.route(BODY, headers).decision.request.prompts == (b"twelve bytes",)


def test_an_unknown_path_is_routed_by_load_unless_there_is_no_parser_for_it(picker: Picker) -> None:
    assert picker.route(b"no JSON", {":path": "/v1/audio"}).decision.request.model == ""
    with pytest.raises(BadRequest, match="no parser registered matching path suffix /v1/audio"):
        Picker(OPENAI_ONLY).route(b"no JSON", {":path": "/v1/audio?x=1"})


# --- choosing and finishing -------------------------------------------------------------------------------------------


def test_a_choice_is_counted(picker: Picker) -> None:
    best = picker.route().decision.picked[0]
    assert picker.sample("request_total", model_name="m", fairness_id="default-flow", priority="0") == 1
    assert picker.sample("scheduler_attempts_total", status="success", endpoint_name=best.name, port="8000") == 1
    assert picker.sample("request_size_bytes_sum", model_name="m") == len(json.dumps(BODY))
    assert picker.sample("scheduler_e2e_duration_seconds_count") == 1


def test_a_request_that_finds_no_endpoint_is_counted_as_such(picker: Picker) -> None:
    with pytest.raises(NoCandidates, match="failed to find endpoint candidates for serving the request"):
        picker.route(subset=frozenset({"10.9.9.9"}))
    assert picker.sample("request_total") == 1
    assert picker.sample("request_error_total", error_code="ServiceUnavailable") == 1
    assert picker.sample("scheduler_attempts_total", status="failure") == 1
    assert picker.sample("scheduler_attempts_total", status="success") == 0


def test_the_size_counted_is_that_of_what_the_client_sent(picker: Picker) -> None:
    """So that one client's traffic reads the same whatever we do to it; the Request says so too."""
    raw = json.dumps(BODY).encode()
    decision, body, changed = picker.route(raw, {"x-llm-d-model-name-rewrite": "a-much-longer-name"})[:3]
    assert changed
    assert len(body) != len(raw)
    assert decision.request.size_bytes == len(raw)
    assert picker.sample("request_size_bytes_sum") == len(raw)


def test_a_request_without_a_body_goes_anywhere_in_its_subset(picker: Picker) -> None:
    chosen = {picker.service.route_blindly(Route({}, None, None))[0].name for _ in range(50)}
    assert chosen == {"pod-0", "pod-1"}
    only = picker.service.route_blindly(Route({}, None, frozenset({"10.0.0.2:8000"})))
    assert only[0].name == "pod-1"
    assert only[1]
    assert not picker.router.open


def test_a_request_without_a_body_and_without_endpoints_is_an_error() -> None:
    with pytest.raises(NoEndpoints) as refused:
        Picker(pods=[]).service.route_blindly(Route({}, None, None))
    assert refused.value.body == "inference error: Internal - no pods available in datastore"


FINISHED = Outcome(
    end=End.FINISHED,
    status=200,
    ttft_ms=120.0,
    e2e_ms=520.0,
    prompt_tokens=7,
    cached_tokens=4,
    output_tokens=5,
    streamed=True,
    response_bytes=900,
)


def finish(picker: Picker, outcome: Outcome) -> Decision:
    decision = picker.route().decision
    picker.clock.now_s += 2.0
    picker.service.finish(decision.ticket, outcome)
    assert not picker.router.open
    return decision


def test_a_finished_request_is_measured(picker: Picker) -> None:
    finish(picker, FINISHED)
    for name, value in {
        "request_duration_seconds_sum": 2.0,
        "request_ttft_seconds_sum": 0.12,
        "request_streaming_tpot_seconds_sum": 0.1,
        "request_input_tokens_sum": 7.0,
        "request_cached_tokens_sum": 4.0,
        "request_output_tokens_sum": 5.0,
        "response_size_bytes_sum": 900.0,
        "request_error_total": 0.0,
    }.items():
        assert picker.sample(name) == pytest.approx(value), name


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome(end=End.FINISHED, status=503), "ModelServerError"),
        (Outcome(end=End.FINISHED, status=404), "ModelServerError"),
        (Outcome(end=End.ABORTED), "aborted"),
        (Outcome(end=End.UPSTREAM_FAILED, status=503), "upstream-failed"),
        (Outcome(end=End.LOST), "lost"),
    ],
)
def test_a_request_that_failed_is_counted_and_not_measured(picker: Picker, outcome: Outcome, code: str) -> None:
    finish(picker, outcome)
    assert picker.sample("request_error_total", error_code=code) == 1
    assert picker.sample("request_error_total") == 1
    assert picker.sample("request_input_tokens_count") == 0
    assert picker.sample("request_ttft_seconds_count") == 0


def test_without_usage_the_estimate_is_the_input(picker: Picker) -> None:
    finish(picker, Outcome(end=End.FINISHED, status=200))
    assert picker.sample("request_input_tokens_sum") == 3


def test_an_end_is_counted_once_and_strangers_not_at_all(picker: Picker) -> None:
    ticket = finish(picker, FINISHED).ticket
    picker.service.finish(ticket, FINISHED)
    picker.service.finish("never-heard-of", FINISHED)
    picker.service.first_token("never-heard-of")
    assert picker.sample("request_duration_seconds_count") == 1
    assert len(picker.lines.texts) == 1


# --- the outcome log --------------------------------------------------------------------------------------------------


def decided(prediction: Prediction | None) -> Decision:
    return Decision(
        ticket="t-1",
        request=Request(id="r-1", model="m", target_model="n", input_tokens=3),
        picked=(PODS[1], PODS[0]),
        scores={"10.0.0.1:8000": 0.123456, "10.0.0.2:8000": 0.9},
        prediction=prediction,
        explored=True,
        at_s=100.0,
    )


def test_an_outcome_line_has_prediction_and_measurement() -> None:
    prediction = Prediction(
        row=(1.0,), ttft_ms=100.12345, tpot_ms=20.0, model_version=4, ttft_quantiles_ms=(101.0, 150.0006)
    )
    record = json.loads(outcome_line(decided(prediction), FINISHED, 101.5))
    assert record.pop("time_s") > 1.7e9
    assert record == {
        "request_id": "r-1",
        "model": "n",
        "endpoint": "default/pod-1",
        "destination": "10.0.0.2:8000",
        "scores": {"10.0.0.1:8000": 0.1235, "10.0.0.2:8000": 0.9},
        "explored": True,
        "model_version": 4,
        "predicted_ttft_ms": 100.123,
        "predicted_tpot_ms": 20.0,
        "predicted_ttft_quantiles_ms": [101.0, 150.001],
        "predicted_tpot_quantiles_ms": [],
        "end": "finished",
        "status": 200,
        "ttft_ms": 120.0,
        "tpot_ms": 100.0,
        "e2e_ms": 520.0,
        "input_tokens": 3,
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "output_tokens": 5,
        "open_s": 1.5,
    }


def test_an_outcome_line_says_null_for_what_is_not_known() -> None:
    record = json.loads(outcome_line(decided(None), Outcome(end=End.LOST), 101.5))
    unknown = ("model_version", "predicted_ttft_ms", "predicted_tpot_ms", "ttft_ms", "tpot_ms", "e2e_ms")
    assert {record[name] for name in (*unknown, "prompt_tokens", "cached_tokens", "output_tokens")} == {None}
    assert (record["end"], record["status"]) == ("lost", 0)


def test_an_outcome_line_is_one_line_whatever_the_client_called_its_request(picker: Picker) -> None:
    decision = picker.route(headers={"x-request-id": 'a"\n\u2028b'}).decision
    picker.service.finish(decision.ticket, FINISHED)
    (line,) = picker.lines.texts
    assert "\n" not in line
    assert json.loads(line)["request_id"] == 'a"\n\u2028b'


def test_a_model_that_cannot_be_rewritten_is_refused_before_anything_is_charged(picker: Picker) -> None:
    raw = json.dumps(BODY).encode()
    headers = {":path": "/v1/completions", "x-llm-d-model-name-rewrite": "another"}
    with pytest.raises(UnsupportedMode, match="request_header_mode SEND"):
        asyncio.run(picker.service.route(Route(headers, raw, None, may_rewrite=False), raw))
    assert not picker.router.open


class _Span(Span):
    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def profile(self, name: str, began_s: float, ended_s: float, timings: Sequence[Timing] = ()) -> None:
        self.told.append((name, began_s <= ended_s, [timing[0] for timing in timings]))

    def decided(self, ticket: str, attributes: Attributes | None = None) -> None:
        self.told.append((ticket,))


class _Tracer(Tracer):
    def __init__(self) -> None:
        self.span = _Span()

    def request(self, headers: Mapping[str, str], attributes: Attributes | None = None) -> Span:
        return self.span


def test_a_trace_is_told_of_the_profile_that_ran_before_it_is_told_where_the_request_goes(picker: Picker) -> None:
    tracer = picker.service.observer.tracer = _Tracer()
    decision = picker.route().decision
    assert tracer.span.told == [("default", True, []), (decision.ticket,)]
    assert picker.service._choices == {}
