"""Entries of Envoy's access log, built with the wire messages -> ticket and Outcome."""

from __future__ import annotations

from typing import Any

import pytest

from llmd_sched.extproc.accesslog import read_entry
from llmd_sched.types import End, Outcome
from llmd_sched.wire import accesslog_pb2

START_S = 1_760_000_000
"""Any start: Envoy's clock is all that counts."""
USAGE = '"usage":{"prompt_tokens":7,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":4}}}'


def at_us(after_us: float) -> float:
    """Microseconds since the epoch, as the Lua filter notes them, of a moment so long after the start."""
    return START_S * 1e6 + 250_000 + after_us


STREAM = {
    "ticket": "t-1",
    "streamed": True,
    "first_us": at_us(150_000),
    "last_us": at_us(950_000),
    "events": 5,
    "tail": "x",
}
WHOLE = {"ticket": "t-1", "streamed": False, "first_us": at_us(150_000), "last_us": at_us(150_000), "tail": "{" + USAGE}


def entry(
    noted: dict[str, Any] | None, *, status: int = 200, flags: dict[str, Any] | None = None, **common: Any
) -> Any:
    """Started at START_S + 250 ms, sent upstream 50 ms later, over after a second."""
    made = accesslog_pb2.HTTPAccessLogEntry()
    properties = made.common_properties
    properties.start_time.seconds = START_S
    properties.start_time.nanos = 250_000_000
    properties.time_to_first_upstream_tx_byte.FromMilliseconds(50)
    properties.duration.FromMilliseconds(1000)
    properties.access_log_type = accesslog_pb2.DownstreamEnd
    for name, value in common.items():
        setattr(properties, name, value)
    for name, value in (flags or {}).items():
        setattr(properties.response_flags, name, value)
    if noted is not None:
        properties.metadata.filter_metadata["llmd"].update(noted)
    if status:
        made.response.response_code.value = status
    made.response.response_body_bytes = 4000
    return made


def outcome(noted: dict[str, Any], **fields: Any) -> Outcome:
    read = read_entry(entry(noted, **fields))
    assert read is not None
    assert read[0] == "t-1"
    return read[1]


def test_a_stream_is_timed_from_when_it_was_sent_upstream() -> None:
    o = outcome(STREAM)
    assert (o.end, o.status, o.streamed, o.response_bytes) == (End.FINISHED, 200, True, 4000)
    assert o.ttft_ms == pytest.approx(100.0)
    assert o.e2e_ms == pytest.approx(900.0)
    assert o.output_tokens == 5
    assert o.tpot_ms == pytest.approx(200.0)


def test_times_keep_their_microseconds() -> None:
    """Microseconds since the epoch need 51 bits; a double has 53."""
    o = outcome({**STREAM, "first_us": at_us(50_001), "last_us": at_us(50_003)})
    assert o.ttft_ms == pytest.approx(0.001, abs=3e-4)
    assert o.e2e_ms == pytest.approx(0.003, abs=3e-4)


def test_a_whole_reply_has_its_usage_and_no_first_token_time() -> None:
    o = outcome(WHOLE)
    assert (o.end, o.streamed, o.ttft_ms, o.tpot_ms) == (End.FINISHED, False, None, None)
    assert o.e2e_ms == pytest.approx(100.0)
    assert (o.prompt_tokens, o.output_tokens, o.cached_tokens) == (7, 5, 4)


@pytest.mark.parametrize(
    ("tail", "events", "tokens"),
    [
        ("data: {}\n\ndata: [DONE]\n\n", 10, 9),
        ("data: {}\n\n", 10, 10),
        ('data: {"choices":[],' + USAGE + "\n\ndata: [DONE]\n\n", 10, 5),
        ("", 0, 0),
        ("data: [DONE]\n\n", 0, 0),
    ],
)
def test_tokens_are_usage_or_else_events_without_the_end_mark(tail: str, events: int, tokens: int) -> None:
    assert outcome({**STREAM, "tail": tail, "events": events}).output_tokens == tokens


def test_an_aborted_stream_carries_only_its_first_token_and_ends_with_the_connection() -> None:
    """Lua is dropped when the client goes, so neither last chunk, nor events, nor tail are noted."""
    noted = {k: STREAM[k] for k in ("ticket", "streamed", "first_us")}
    o = outcome(noted, flags={"downstream_connection_termination": True})
    assert (o.end, o.status, o.streamed) == (End.ABORTED, 200, True)
    assert o.ttft_ms == pytest.approx(100.0)
    assert o.e2e_ms == pytest.approx(950.0)
    assert (o.output_tokens, o.tpot_ms) == (None, None), "not observed is None, not 0"


def test_a_request_aborted_before_any_reply_has_no_times_of_it() -> None:
    o = outcome({"ticket": "t-1"}, status=0, flags={"downstream_connection_termination": True})
    assert (o.end, o.status, o.streamed, o.ttft_ms, o.output_tokens) == (End.ABORTED, 0, False, None, None)


def test_a_request_that_never_went_upstream_is_timed_from_its_start() -> None:
    made = entry({"ticket": "t-1"}, status=503, flags={"no_healthy_upstream": True})
    made.common_properties.ClearField("time_to_first_upstream_tx_byte")
    read = read_entry(made)
    assert read is not None
    assert read[1].end is End.UPSTREAM_FAILED
    assert read[1].e2e_ms == pytest.approx(1000.0)


def test_no_time_is_negative_when_the_entry_lacks_a_duration() -> None:
    made = entry({"ticket": "t-1"}, status=0)
    made.common_properties.ClearField("duration")
    read = read_entry(made)
    assert read is not None
    assert (read[1].e2e_ms or 0.0) >= 0.0


ABORTED = ["downstream_connection_termination", "local_reset", "stream_idle_timeout", "downstream_remote_reset"]
UPSTREAM_FAILED = [
    "no_healthy_upstream",
    "upstream_request_timeout",
    "upstream_remote_reset",
    "upstream_connection_failure",
    "upstream_connection_termination",
    "upstream_overflow",
    "no_route_found",
    "upstream_retry_limit_exceeded",
    "upstream_protocol_error",
    "no_cluster_found",
]


@pytest.mark.parametrize(
    ("flag", "end"), [*((f, End.ABORTED) for f in ABORTED), *((f, End.UPSTREAM_FAILED) for f in UPSTREAM_FAILED)]
)
def test_a_flag_says_how_a_request_ended(flag: str, end: End) -> None:
    assert outcome(STREAM, flags={flag: True}).end is end


@pytest.mark.parametrize("flag", ["delay_injected", "fault_injected", "dns_resolution_failure"])
def test_other_flags_leave_a_reply_finished(flag: str) -> None:
    if flag not in accesslog_pb2.ResponseFlags.DESCRIPTOR.fields_by_name:
        pytest.skip(f"{flag} is not in our definitions")
    assert outcome(STREAM, flags={flag: True}).end is End.FINISHED


def test_when_both_sides_broke_off_the_upstream_is_named() -> None:
    flags = {"upstream_remote_reset": True, "downstream_connection_termination": True}
    assert outcome(STREAM, flags=flags).end is End.UPSTREAM_FAILED


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_an_error_of_the_engine_is_a_finished_reply_with_its_status(status: int) -> None:
    o = outcome({**STREAM, "streamed": False}, status=status)
    assert (o.end, o.status, o.output_tokens) == (End.FINISHED, status, None)


def test_without_a_status_nobody_was_answered() -> None:
    assert outcome(STREAM, status=0).end is End.ABORTED


@pytest.mark.parametrize("noted", [None, {}, {"streamed": True, "first_us": 1.0}])
def test_a_request_without_a_ticket_is_not_ours(noted: dict[str, Any] | None) -> None:
    assert read_entry(entry(noted)) is None


def test_metadata_of_other_namespaces_is_not_ours() -> None:
    made = entry(None)
    made.common_properties.metadata.filter_metadata["envoy.lb"].update({"ticket": "t-1"})
    assert read_entry(made) is None


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("NotSet", True),
        ("DownstreamEnd", True),
        ("DownstreamStart", False),
        ("DownstreamPeriodic", False),
        ("UpstreamPoolReady", False),
        ("UpstreamPeriodic", False),
        ("UpstreamEnd", False),
        ("TcpConnectionEnd", False),
        ("DownstreamTunnelSuccessfullyEstablished", False),
    ],
)
def test_only_the_entry_at_the_end_of_a_request_is_read(kind: str, read: bool) -> None:
    value = accesslog_pb2.AccessLogType.Value(kind)
    assert (read_entry(entry(STREAM, access_log_type=value)) is not None) is read


def test_an_empty_entry_is_no_crash() -> None:
    assert read_entry(accesslog_pb2.HTTPAccessLogEntry()) is None


@pytest.mark.parametrize(
    "noted",
    [
        {"streamed": "yes", "first_us": "soon", "last_us": None, "events": [1], "tail": 3.0},
        {"first_us": -1.0, "last_us": 0.0, "events": -5.0, "tail": "\ufffd"},
    ],
)
def test_nonsense_in_our_metadata_is_no_crash(noted: dict[str, Any]) -> None:
    """Another filter may write to the same namespace."""
    assert outcome({"ticket": "t-1", **noted}).end is End.FINISHED


@pytest.mark.parametrize("ticket", [None, 3.0, True, ["t-1"]])
def test_a_ticket_that_is_no_text_finishes_nothing(ticket: Any) -> None:
    read = read_entry(entry({**STREAM, "ticket": ticket}))
    assert read is None or read[0] == ""
