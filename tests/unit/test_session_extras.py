"""What a decision adds to the wire beyond the destination: headers both ways, metadata, replies nobody follows."""

from __future__ import annotations

import msgspec
import pytest
from google.protobuf.struct_pb2 import Struct

from llmd_sched.extproc.session import Route, Session
from llmd_sched.types import Decision, End, Outcome, Request
from llmd_sched.wire import ext_proc_pb2
from tests.builders import endpoint
from tests.messages import (
    DUPLEX,
    LEAN,
    removed_by,
    request_body,
    request_headers,
    response_body,
    response_headers,
    response_trailers,
    routing_reply,
    set_by,
)
from tests.unit.test_session import LIMIT_BYTES, Driver

PLAIN = Decision(ticket="t", request=Request(id="r"), picked=(endpoint(),), scores={}, prediction=None, at_s=0.0)
REPORTED = Struct()
REPORTED.fields["envoy.lb"].struct_value.fields["cost"].number_value = 10


def decided(**fields: object) -> Decision:
    return msgspec.structs.replace(PLAIN, **fields)


@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
def test_a_decision_sets_its_headers_and_takes_off_those_of_ours_it_does_not_set(mode: str) -> None:
    session = Session(LIMIT_BYTES, ours=("x-prefiller-host-port", "x-encoder-hosts-ports"))
    driver = Driver(session, decided=decided(headers={"x-prefiller-host-port": "10.0.0.9:8000"}))
    driver.send(request_headers(mode), request_body(b"{}", end=True))
    reply = routing_reply(driver.replies)
    assert set_by(reply)["x-prefiller-host-port"] == "10.0.0.9:8000"
    assert removed_by(reply) == ["x-encoder-hosts-ports"]


def test_a_destination_may_be_another_than_the_endpoint_picked() -> None:
    driver = Driver(decided=decided(elsewhere="10.0.0.1:9000"))
    driver.send(request_headers(), request_body(b"{}", end=True))
    reply = driver.replies[0]
    assert set_by(reply)["x-gateway-destination-endpoint"] == "10.0.0.1:9000"
    lb = reply.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    assert lb["x-gateway-destination-endpoint"].string_value == "10.0.0.1:9000"


def test_headers_for_the_reply_are_set_on_it() -> None:
    driver = Driver(decided=decided(reply_headers={"x-session-token": "abc"}))
    driver.send(request_headers(), request_body(b"{}", end=True), response_headers())
    assert set_by(driver.replies[-1]) == {"x-went-into-resp-headers": "true", "x-session-token": "abc"}


def test_on_the_lean_path_headers_for_the_reply_travel_as_metadata() -> None:
    driver = Driver(decided=decided(reply_headers={"x-session-token": "abc"}))
    driver.send(request_headers(LEAN), request_body(b"{}", end=True))
    ours = driver.replies[-1].dynamic_metadata.fields["llmd"].struct_value.fields
    assert ours["reply_headers"].struct_value.fields["x-session-token"].string_value == "abc"


@pytest.mark.parametrize("last", [response_body(b"cd", end=True), response_trailers()], ids=["body", "trailers"])
def test_what_is_reported_of_a_reply_comes_with_its_last_message(last: ext_proc_pb2.ProcessingRequest) -> None:
    seen: list[Outcome] = []
    session = Session(LIMIT_BYTES, report=lambda outcome: seen.append(outcome) or REPORTED)  # type: ignore[func-returns-value]
    driver = Driver(session)
    driver.send(request_headers(), request_body(b"{}", end=True), response_headers(), response_body(b"ab"), last)
    told = [r.HasField("dynamic_metadata") and "envoy.lb" in r.dynamic_metadata.fields for r in driver.replies[-2:]]
    assert driver.replies[-1].dynamic_metadata == REPORTED
    assert told[-1]
    assert [outcome.end for outcome in seen] == [End.FINISHED]


def test_nothing_is_reported_of_a_reply_that_breaks_off() -> None:
    driver = Driver(Session(LIMIT_BYTES, report=lambda outcome: REPORTED))
    driver.send(request_headers(), request_body(b"{}", end=True), response_headers(), response_body(b"ab")).close()
    assert driver.outcome.end is End.ABORTED
    assert driver.replies[-1].dynamic_metadata != REPORTED


def test_an_evicted_request_ends_as_evicted_and_not_again() -> None:
    session = Session(LIMIT_BYTES)
    driver = Driver(session)
    driver.send(request_headers(), request_body(b"{}", end=True))
    assert any(isinstance(e, Route) for e in driver.events)
    (ended,) = session.peer_closed(9.0, End.EVICTED)
    assert ended.outcome.end is End.EVICTED
    assert session.peer_closed(10.0) == []
