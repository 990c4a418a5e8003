"""One ext_proc stream as a state machine, driven by tables of messages. No gRPC, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched import errors
from llmd_sched.extproc.messages import ATTRIBUTES
from llmd_sched.extproc.session import Ended, Event, FirstToken, Path, Route, Session
from llmd_sched.types import Decision, End, Endpoint, Outcome, Prediction, Request
from llmd_sched.wire import ext_proc_pb2
from tests.builders import fuzzed
from tests.messages import (
    DUPLEX,
    LEAN,
    MODES,
    Message,
    Reply,
    lines,
    removed_by,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    set_by,
    stream_headers,
    with_mode,
    with_subset,
)

POD = Endpoint(name="pod-a", address="10.0.0.1", port=8000)
OTHER = Endpoint(name="pod-b", address="10.0.0.2", port=8000)
LIMIT_BYTES = 1 << 20

# --- the driver, and what comes back ----------------------------------------------------------------------------------


def decision(
    *, streaming: bool = False, prediction: Prediction | None = None, picked: Sequence[Endpoint] = ()
) -> Decision:
    return Decision(
        ticket="t-1",
        request=Request(id="made-up-id", streaming=streaming),
        picked=tuple(picked) or (POD,),
        scores={POD.hostport: 0.75, OTHER.hostport: 0.25},
        prediction=prediction,
        at_s=0.0,
    )


class Driver:
    """Answers every Route at once, as the server does, and keeps all events in order. One message is one second."""

    def __init__(
        self, session: Session | None = None, *, decided: Decision | None = None, replaced: bytes | None = None
    ) -> None:
        self.session = session or Session(LIMIT_BYTES)
        self.decided = decided or decision()
        self.replaced = replaced
        self.events: list[Event] = []
        self.now_s = 0.0

    def send(self, *messages: Message) -> Driver:
        for message in messages:
            self.now_s += 1.0
            self._take(self.session.receive(message, self.now_s))
        return self

    def close(self) -> Driver:
        self.now_s += 1.0
        self._take(self.session.peer_closed(self.now_s))
        return self

    def _take(self, events: list[Event]) -> None:
        for event in events:
            self.events.append(event)
            if isinstance(event, Route):
                self._take(self._answer(event))

    def _answer(self, route: Route) -> list[Event]:
        if route.body is None:
            return self.session.routed_blindly(POD, "made-up-id")
        changed = self.replaced is not None
        body = self.replaced if self.replaced is not None else route.body
        return self.session.routed(self.decided, body, self.now_s, body_changed=changed)

    @property
    def replies(self) -> list[Reply]:
        return [e for e in self.events if isinstance(e, Reply)]

    @property
    def routes(self) -> list[Route]:
        return [e for e in self.events if isinstance(e, Route)]

    @property
    def shapes(self) -> list[str]:
        return [shape(e) for e in self.events]

    @property
    def outcome(self) -> Outcome:
        (ended,) = [e for e in self.events if isinstance(e, Ended)]
        return ended.outcome


def shape(event: Event) -> str:
    """One word per event: what it is, for bodies the size and a full stop at the end of the stream."""
    if isinstance(event, Route):
        return "Route()" if event.body is None else f"Route({len(event.body)})"
    if isinstance(event, FirstToken):
        return "FirstToken"
    if isinstance(event, Ended):
        return f"Ended({event.outcome.end.value})"
    kind = event.WhichOneof("response")
    if kind == "immediate_response":
        return f"refused {int(event.immediate_response.status.code)}"
    if kind in ("request_body", "response_body"):
        mutation = getattr(event, kind).response.body_mutation
        if not mutation.HasField("streamed_response"):
            return f"{kind} {len(mutation.body)}" if mutation.body else kind
        streamed = mutation.streamed_response
        return f"{kind} {len(streamed.body)}{'.' if streamed.end_of_stream else ''}"
    assert kind
    return kind


def body_of(driver: Driver, kind: str) -> bytes:
    """All streamed pieces of ``request_body`` or ``response_body`` put together."""
    pieces = [r for r in driver.replies if r.WhichOneof("response") == kind]
    return b"".join(getattr(r, kind).response.body_mutation.streamed_response.body for r in pieces)


# --- orders of messages -----------------------------------------------------------------------------------------------

ORDERS: dict[str, tuple[list[Message], list[str]]] = {
    "duplex: the reply to the headers waits for the body": (
        [request_headers()],
        [],
    ),
    "duplex: chunks are collected without an answer": (
        [request_headers(), request_body(b"ab"), request_body(b"cd")],
        [],
    ),
    "duplex: headers, then the body, once the body has ended": (
        [request_headers(), request_body(b"ab"), request_body(b"cde", end=True)],
        ["Route(5)", "request_headers", "request_body 5."],
    ),
    "duplex: an empty last chunk ends the body": (
        [request_headers(), request_body(b"ab"), request_body(b"", end=True)],
        ["Route(2)", "request_headers", "request_body 2."],
    ),
    "duplex: an empty body is one empty chunk": (
        [request_headers(), request_body(b"", end=True)],
        ["Route(0)", "request_headers", "request_body 0."],
    ),
    "duplex: no body at all is answered at once": (
        [request_headers(end=True)],
        ["Route()", "request_headers"],
    ),
    "duplex: trailers end a body that was not ended, and come last": (
        [request_headers(), request_body(b"abc"), request_trailers()],
        ["Route(3)", "request_headers", "request_body 3", "request_trailers"],
    ),
    "duplex: trailers without a body": (
        [request_headers(), request_trailers()],
        ["Route(0)", "request_headers", "request_body 0", "request_trailers"],
    ),
    "duplex: trailers after the body's end are only answered": (
        [request_headers(), request_body(b"abc", end=True), request_trailers()],
        ["Route(3)", "request_headers", "request_body 3.", "request_trailers"],
    ),
    "lean: the headers are let through to get the body": (
        [request_headers(LEAN)],
        ["request_headers"],
    ),
    "lean: the body is answered without a body": (
        [request_headers(LEAN), request_body(b"abc", end=True)],
        ["request_headers", "Route(3)", "request_body"],
    ),
    "lean: a buffered body before trailers does not end the stream and is answered all the same": (
        [request_headers(LEAN), request_body(b"abc")],
        ["request_headers", "Route(3)", "request_body"],
    ),
    "lean: an empty body": (
        [request_headers(LEAN), request_body(b"", end=True)],
        ["request_headers", "Route(0)", "request_body"],
    ),
    "lean: no body at all": (
        [request_headers(LEAN, end=True)],
        ["Route()", "request_headers"],
    ),
    "a proxy that does not say its mode gets the duplex path": (
        [request_headers(None), request_body(b"abc", end=True)],
        ["Route(3)", "request_headers", "request_body 3."],
    ),
    "a whole reply": (
        [request_headers(), request_body(b"{}", end=True), response_headers(), response_body(b"{}", end=True)],
        ["Route(2)", "request_headers", "request_body 2.", "response_headers", "response_body 2.", "Ended(finished)"],
    ),
    "a whole reply in pieces is echoed piece by piece": (
        [
            request_headers(),
            request_body(b"{}", end=True),
            response_headers(),
            response_body(b"{"),
            response_body(b"}"),
            response_body(b"", end=True),
        ],
        [
            "Route(2)",
            "request_headers",
            "request_body 2.",
            "response_headers",
            "response_body 1",
            "response_body 1",
            "response_body 0.",
            "Ended(finished)",
        ],
    ),
    "a stream": (
        [
            request_headers(),
            request_body(b"{}", end=True),
            stream_headers(),
            response_body(b"data: 1\n\n"),
            response_body(b"data: 2\n\n"),
            response_body(b"data: [DONE]\n\n", end=True),
        ],
        [
            "Route(2)",
            "request_headers",
            "request_body 2.",
            "response_headers",
            "FirstToken",
            "response_body 9",
            "response_body 9",
            "response_body 14.",
            "Ended(finished)",
        ],
    ),
    "a reply of headers only": (
        [request_headers(), request_body(b"{}", end=True), response_headers("204", end=True)],
        ["Route(2)", "request_headers", "request_body 2.", "response_headers", "Ended(finished)"],
    ),
    "a reply that ends with trailers": (
        [
            request_headers(),
            request_body(b"{}", end=True),
            response_headers(),
            response_body(b"abc"),
            response_trailers(),
        ],
        [
            "Route(2)",
            "request_headers",
            "request_body 2.",
            "response_headers",
            "response_body 3",
            "response_trailers",
            "Ended(finished)",
        ],
    ),
    "the reply to a request without a body is echoed and not followed": (
        [request_headers(end=True), response_headers(), response_body(b"{}", end=True)],
        ["Route()", "request_headers", "response_headers", "response_body 2."],
    ),
    "a response phase without a request phase": (
        [response_headers(), response_body(b"ab"), response_body(b"c", end=True)],
        ["response_headers", "response_body 2", "response_body 1."],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_messages_in_this_order_give_these_events(name: str) -> None:
    messages, expected = ORDERS[name]
    assert Driver().send(*messages).shapes == expected


@pytest.mark.parametrize(
    ("messages", "done"),
    [
        ([request_headers(), request_body(b"{}", end=True)], False),
        ([request_headers(LEAN)], False),
        ([request_headers(LEAN), request_body(b"{}", end=True)], True),
        ([request_headers(LEAN, end=True)], True),
        ([request_headers(end=True)], False),
        ([request_headers(end=True), response_headers(), response_body(b"", end=True)], True),
        ([request_headers(), request_body(b"{}", end=True), response_headers(end=True)], True),
        ([request_headers(), request_body(b"{}", end=True), response_headers()], False),
        ([request_headers("NONE")], True),
    ],
)
def test_the_stream_is_done_when_everything_is_answered(messages: list[Message], done: bool) -> None:
    assert Driver().send(*messages).session.done is done


@pytest.mark.parametrize(
    "first",
    [
        [request_headers(LEAN), request_body(b"{}", end=True)],
        [request_headers(LEAN, end=True)],
        [request_headers(), request_body(b"{}", end=True), response_headers(end=True)],
        [request_headers("STREAMED")],
        [request_headers(content_length=str(LIMIT_BYTES + 1))],
    ],
)
def test_messages_after_the_end_are_ignored(first: list[Message]) -> None:
    driver = Driver().send(*first)
    before = list(driver.shapes)
    driver.send(
        request_headers(end=True),
        request_body(b"more", end=True),
        request_trailers(),
        response_headers(),
        response_body(b"more", end=True),
        response_trailers(),
    )
    assert driver.close().shapes == before


def test_a_message_that_says_nothing_is_ignored() -> None:
    assert Driver().send(Message(), request_headers(), Message()).shapes == []


def test_a_body_after_the_route_is_ignored() -> None:
    driver = Driver().send(request_headers(), request_body(b"ab", end=True), request_body(b"cd", end=True))
    assert driver.shapes == ["Route(2)", "request_headers", "request_body 2."]


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "path"), [(LEAN, Path.LEAN), (DUPLEX, Path.DUPLEX), (None, Path.DUPLEX)])
def test_the_first_message_says_the_path(mode: str | None, path: Path) -> None:
    assert Driver().send(request_headers(mode)).session.path is path


def test_only_the_first_message_says_the_path() -> None:
    driver = Driver().send(request_headers(), with_mode(request_body(b"{}", end=True), LEAN))
    assert driver.session.path is Path.DUPLEX
    assert driver.shapes[-1] == "request_body 2."


@pytest.mark.parametrize("mode", ["NONE", "STREAMED", "BUFFERED_PARTIAL", "GRPC"])
def test_a_mode_we_do_not_speak_is_refused_by_name(mode: str) -> None:
    if mode not in MODES.keys():  # noqa: SIM118 (an enum wrapper, no mapping)
        pytest.skip(f"{mode} is not in our definitions")
    driver = Driver().send(request_headers(mode))
    assert driver.shapes == ["refused 500"]
    text = driver.replies[0].immediate_response.body.decode()
    assert text.startswith(f"inference error: Internal - request_body_mode {mode} is not supported; ")
    assert LEAN in text
    assert DUPLEX in text


# --- what reaches the router ------------------------------------------------------------------------------------------


def routed(*messages: Message, **options: Any) -> Route:
    (route,) = Driver(Session(LIMIT_BYTES, **options)).send(*messages).routes
    return route


@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
def test_the_router_gets_the_body_and_lower_case_headers(mode: str) -> None:
    headers = request_headers(mode)
    headers.request_headers.headers.headers.add(key="X-Mixed-Case", raw_value=b"raw")
    headers.request_headers.headers.headers.add(key="x-old-proxy", value="text")
    headers.request_headers.headers.headers.add(key="x-bytes", raw_value=b"\xff")
    route = routed(headers, request_body(b"abc", end=True))
    assert route.body == b"abc"
    assert route.headers[":path"] == "/v1/completions"
    assert route.headers["x-mixed-case"] == "raw"
    assert route.headers["x-old-proxy"] == "text"
    assert route.headers["x-bytes"] == "\ufffd"


@pytest.mark.parametrize(
    "pieces", [[b"abcdef"], [b"", b"abcdef"], [b"abc", b"def"], [b"a", b"b", b"c", b"d", b"e", b"f"], [b"abcdef", b""]]
)
def test_chunks_are_put_together_whatever_their_cut(pieces: list[bytes]) -> None:
    messages = [request_body(p, end=i == len(pieces) - 1) for i, p in enumerate(pieces)]
    driver = Driver().send(request_headers(), *messages)
    assert driver.routes[0].body == b"abcdef"
    assert body_of(driver, "request_body") == b"abcdef"


@pytest.mark.parametrize(
    ("value", "subset"),
    [
        (["10.0.0.1:8000", "10.0.0.2"], {"10.0.0.1:8000", "10.0.0.2"}),
        ("10.0.0.1:8000, 10.0.0.2 ,", {"10.0.0.1:8000", "10.0.0.2"}),
        ("10.0.0.1", {"10.0.0.1"}),
        ([], set()),
        ("", set()),
        (["", " "], set()),
        (3.0, set()),
    ],
)
@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
def test_the_subset_hint_is_a_list_or_a_string(mode: str, value: Any, subset: set[str]) -> None:
    route = routed(request_headers(mode), with_subset(request_body(b"{}", end=True), value))
    assert route.subset == subset


@pytest.mark.parametrize("namespace", ["envoy.lb", "llmd"])
def test_without_a_hint_there_is_no_subset(namespace: str) -> None:
    assert routed(request_headers(), request_body(b"{}", end=True)).subset is None
    elsewhere = with_subset(request_body(b"{}", end=True), ["10.0.0.1"], namespace)
    assert routed(request_headers(), elsewhere).subset is None


def test_a_hint_without_our_key_is_none() -> None:
    body = request_body(b"{}", end=True)
    body.metadata_context.filter_metadata["envoy.lb.subset_hint"].update({"something-else": ["10.0.0.1"]})
    assert routed(request_headers(), body).subset is None


def test_a_request_without_a_body_honours_the_hint_of_its_headers() -> None:
    assert routed(with_subset(request_headers(end=True), ["10.0.0.2"])).subset == {"10.0.0.2"}


def test_trailers_carry_the_hint_when_they_end_the_body() -> None:
    route = routed(request_headers(), request_body(b"{}"), with_subset(request_trailers(), ["10.0.0.2"]))
    assert route.subset == {"10.0.0.2"}


def test_a_flag_ignores_the_hint() -> None:
    body = with_subset(request_body(b"{}", end=True), ["10.0.0.2"])
    assert routed(request_headers(), body, honour_subset=False).subset is None


# --- what goes back to the proxy --------------------------------------------------------------------------------------


def reply_of(driver: Driver, kind: str) -> Reply:
    return next(r for r in reversed(driver.replies) if r.WhichOneof("response") == kind)


CASES = [(LEAN, "request_body"), (DUPLEX, "request_headers")]


@pytest.mark.parametrize(("mode", "kind"), CASES)
def test_destination_header_and_metadata_say_the_same(mode: str, kind: str) -> None:
    driver = Driver(decided=decision(picked=(OTHER, POD))).send(request_headers(mode), request_body(b"{}", end=True))
    reply = reply_of(driver, kind)
    assert set_by(reply)["x-gateway-destination-endpoint"] == "10.0.0.2:8000,10.0.0.1:8000"
    assert dict(reply.dynamic_metadata["envoy.lb"]) == {"x-gateway-destination-endpoint": "10.0.0.2:8000,10.0.0.1:8000"}
    assert dict(reply.dynamic_metadata["llmd"]) == {"ticket": "t-1"}


@pytest.mark.parametrize(("mode", "kind"), [*CASES, (LEAN, None), (DUPLEX, None)])
def test_the_proxy_looks_for_a_route_again(mode: str, kind: str | None) -> None:
    messages = [request_headers(mode), request_body(b"{}", end=True)] if kind else [request_headers(mode, end=True)]
    reply = reply_of(Driver().send(*messages), kind or "request_headers")
    assert getattr(reply, kind or "request_headers").response.clear_route_cache


@pytest.mark.parametrize(("mode", "kind"), CASES)
def test_scores_are_in_the_metadata_only_when_asked_for(mode: str, kind: str) -> None:
    session = Session(LIMIT_BYTES, emit_scores=True)
    reply = reply_of(Driver(session).send(request_headers(mode), request_body(b"{}", end=True)), kind)
    scores = reply.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint-scores"]
    assert dict(scores) == {"10.0.0.1:8000": 0.75, "10.0.0.2:8000": 0.25}


def test_a_prediction_rides_in_our_metadata() -> None:
    prediction = Prediction(row=(), ttft_ms=12.34567, tpot_ms=8.9, model_version=3)
    driver = Driver(decided=decision(prediction=prediction)).send(request_headers(LEAN), request_body(b"{}", end=True))
    assert dict(reply_of(driver, "request_body").dynamic_metadata["llmd"]) == {
        "ticket": "t-1",
        "model_version": 3.0,
        "predicted_ttft_ms": 12.346,
        "predicted_tpot_ms": 8.9,
    }


@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
def test_a_request_without_a_body_has_a_destination_and_no_ticket(mode: str) -> None:
    reply = Driver().send(request_headers(mode, end=True, x_request_id="r-1")).replies[0]
    assert set_by(reply) == {"x-gateway-destination-endpoint": "10.0.0.1:8000"}
    assert list(reply.dynamic_metadata) == ["envoy.lb"]


@pytest.mark.parametrize(
    ("mode", "kind", "replaced", "content_length"),
    [
        (DUPLEX, "request_headers", None, "5"),
        (DUPLEX, "request_headers", b"longer body", "11"),
        (LEAN, "request_body", None, None),
        (LEAN, "request_body", b"longer body", "11"),
    ],
)
def test_content_length_is_set_on_the_duplex_path_and_for_a_changed_body(
    mode: str, kind: str, replaced: bytes | None, content_length: str | None
) -> None:
    driver = Driver(replaced=replaced).send(request_headers(mode, content_length="5"), request_body(b"abcde", end=True))
    assert set_by(reply_of(driver, kind)).get("content-length") == content_length


def test_the_lean_path_sends_a_body_back_only_when_it_changed() -> None:
    kept = Driver().send(request_headers(LEAN), request_body(b"abcde", end=True))
    assert not reply_of(kept, "request_body").request_body.response.HasField("body_mutation")
    changed = Driver(replaced=b"other").send(request_headers(LEAN), request_body(b"abcde", end=True))
    assert reply_of(changed, "request_body").request_body.response.body_mutation.body == b"other"


def test_the_duplex_path_sends_the_changed_body() -> None:
    driver = Driver(replaced=b"other").send(request_headers(), request_body(b"abcde", end=True))
    assert body_of(driver, "request_body") == b"other"


@pytest.mark.parametrize(("mode", "kind"), CASES)
@pytest.mark.parametrize(("sent", "made"), [(None, "made-up-id"), ("", "made-up-id"), ("r-1", None)])
def test_a_request_id_is_added_only_when_there_is_none(
    mode: str, kind: str, sent: str | None, made: str | None
) -> None:
    values = {} if sent is None else {"x_request_id": sent}
    driver = Driver().send(request_headers(mode, **values), request_body(b"{}", end=True))
    assert set_by(reply_of(driver, kind)).get("x-request-id") == made


@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
@pytest.mark.parametrize(("sent", "made"), [(None, "made-up-id"), ("", "made-up-id"), ("r-1", None)])
def test_a_request_without_a_body_gets_an_id_too(mode: str, sent: str | None, made: str | None) -> None:
    values = {} if sent is None else {"x_request_id": sent}
    reply = Driver().send(request_headers(mode, end=True, **values)).replies[0]
    assert set_by(reply).get("x-request-id") == made


@pytest.mark.parametrize(("mode", "kind"), CASES)
def test_no_received_header_is_set_again(mode: str, kind: str) -> None:
    received = request_headers(
        mode, x_request_id="r-1", authorization="Bearer s", traceparent="00-1-2-01", x_llm_d_slo_ttft_ms="10"
    )
    driver = Driver().send(received, request_body(b"{}", end=True))
    expected = {"x-gateway-destination-endpoint"} | ({"content-length"} if mode == DUPLEX else set())
    assert set(set_by(reply_of(driver, kind))) == expected
    assert removed_by(reply_of(driver, kind)) == []


@pytest.mark.parametrize(
    ("size_bytes", "pieces"),
    [
        (0, [0]),
        (1, [1]),
        (61_999, [61_999]),
        (62_000, [62_000]),
        (62_001, [62_000, 1]),
        (124_000, [62_000, 62_000]),
        (124_001, [62_000, 62_000, 1]),
    ],
)
@pytest.mark.parametrize("trailers", [False, True])
def test_a_body_goes_up_in_pieces_and_only_the_last_one_ends_it(
    size_bytes: int, pieces: list[int], trailers: bool
) -> None:
    body = bytes(i % 251 for i in range(size_bytes))
    last = [request_body(body), request_trailers()] if trailers else [request_body(body, end=True)]
    driver = Driver().send(request_headers(), *last)
    sent = [f"request_body {n}" for n in pieces]
    if trailers:
        sent.append("request_trailers")
    else:
        sent[-1] += "."
    assert driver.shapes == [f"Route({size_bytes})", "request_headers", *sent]
    assert body_of(driver, "request_body") == body


@pytest.mark.parametrize(("size_bytes", "pieces"), [(62_000, [62_000]), (62_001, [62_000, 1]), (0, [0])])
@pytest.mark.parametrize("end", [False, True])
def test_a_reply_comes_down_in_pieces_too(size_bytes: int, pieces: list[int], end: bool) -> None:
    body = bytes(i % 251 for i in range(size_bytes))
    driver = Driver().send(response_headers(), response_body(body, end=end))
    expected = [f"response_body {n}" for n in pieces]
    expected[-1] += "." if end else ""
    assert driver.shapes == ["response_headers", *expected]
    assert body_of(driver, "response_body") == body


def test_every_reply_seen_is_marked_and_keeps_its_headers() -> None:
    for messages in ([response_headers()], [request_headers(), request_body(b"{}", end=True), stream_headers()]):
        assert set_by(Driver().send(*messages).replies[-1]) == {"x-went-into-resp-headers": "true"}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "text", "reason"),
    [
        (errors.BadRequest("model not found"), 400, "inference error: BadRequest - model not found", None),
        (errors.PayloadTooLarge("too long"), 413, "inference error: PayloadTooLarge - too long", None),
        (errors.NoCandidates("none"), 503, "inference error: ServiceUnavailable - none", "rejected-no-endpoints"),
        (errors.NoneLeft("all gone"), 429, "inference error: ResourceExhausted - all gone", "rejected-saturated"),
        (errors.NoEndpoints("no pods"), 500, "inference error: Internal - no pods", None),
        (errors.UnsupportedMode("odd"), 500, "inference error: Internal - odd", None),
    ],
)
@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
def test_a_refusal_says_why(mode: str, error: errors.RequestError, status: int, text: str, reason: str | None) -> None:
    session = Session(LIMIT_BYTES)
    session.receive(request_headers(mode), 0.0)
    (reply,) = session.refused(error)
    assert isinstance(reply, Reply)
    immediate = reply.immediate_response
    assert (int(immediate.status.code), immediate.body.decode()) == (status, text)
    expected = {"content-type": "text/plain"} | ({"x-llm-d-request-dropped-reason": reason} if reason else {})
    assert set_by(reply) == expected
    assert immediate.details
    assert session.done
    assert session.peer_closed(1.0) == []


@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
def test_a_body_declared_too_long_is_refused_at_its_headers(mode: str) -> None:
    driver = Driver(Session(10)).send(request_headers(mode, content_length="11"))
    assert driver.shapes == ["refused 413"]
    assert driver.replies[0].immediate_response.body.decode() == (
        "inference error: PayloadTooLarge - request body of 11 bytes exceeds the limit of 10"
    )


@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
@pytest.mark.parametrize("declared", ["", "10", "-1", "1e3", "ten"])
def test_a_body_within_the_limit_passes(mode: str, declared: str) -> None:
    driver = Driver(Session(10)).send(request_headers(mode, content_length=declared), request_body(b"x" * 10, end=True))
    assert driver.routes[0].body == b"x" * 10


@pytest.mark.parametrize("declared", ["\u00b2", "\u0661", "9" * 5000])
def test_a_nonsense_content_length_is_no_crash(declared: str) -> None:
    """Superscripts are digits to ``str.isdigit`` and no number to ``int``; nor is a number of 5,000 digits."""
    driver = Driver(Session(10)).send(request_headers(content_length=declared))
    assert driver.shapes in ([], ["refused 413"], ["refused 400"])


def test_a_nonsense_status_is_no_crash() -> None:
    driver = Driver().send(request_headers(), request_body(b"{}", end=True), response_headers("\u00b2\u00b2"))
    assert driver.close().outcome.status == 0


@pytest.mark.parametrize("mode", [LEAN, DUPLEX])
def test_a_body_that_turns_out_too_long_is_refused(mode: str) -> None:
    driver = Driver(Session(10)).send(request_headers(mode, content_length="10"), request_body(b"x" * 11, end=True))
    assert driver.shapes[-1] == "refused 413"
    assert not driver.routes


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_long() -> None:
    driver = Driver(Session(10)).send(request_headers(), request_body(b"x" * 6), request_body(b"x" * 6))
    assert driver.shapes == ["refused 413"]


# --- what became of the request ---------------------------------------------------------------------------------------

ROUTED = (request_headers(), request_body(b"{}", end=True))


@pytest.mark.parametrize(
    ("messages", "first_tokens"),
    [
        ([stream_headers(), response_body(b"data: 1\n\n"), response_body(b"data: 2\n\n", end=True)], 1),
        ([stream_headers(), response_body(b""), response_body(b"data: 1\n\n", end=True)], 1),
        ([stream_headers(), response_body(b"", end=True)], 0),
        ([stream_headers(), response_body(b""), response_trailers()], 0),
        ([stream_headers("503"), response_body(b"data: 1\n\n", end=True)], 0),
        ([stream_headers("201"), response_body(b"data: 1\n\n", end=True)], 0),
        ([response_headers(), response_body(b"{"), response_body(b"}", end=True)], 0),
    ],
)
def test_the_first_token_is_the_first_byte_of_a_successful_stream(messages: list[Message], first_tokens: int) -> None:
    driver = Driver().send(*ROUTED, *messages)
    assert driver.shapes.count("FirstToken") == first_tokens


def test_the_first_token_is_told_before_its_chunk_goes_out() -> None:
    driver = Driver().send(*ROUTED, stream_headers(), response_body(b"data: 1\n\n"))
    assert driver.shapes[-2:] == ["FirstToken", "response_body 9"]


@pytest.mark.parametrize("asked", [False, True])
def test_the_content_type_says_whether_a_reply_streams_not_the_request(asked: bool) -> None:
    def outcome(headers: Message) -> Outcome:
        return Driver(decided=decision(streaming=asked)).send(*ROUTED, headers, response_body(b"x", end=True)).outcome

    assert outcome(stream_headers()).streamed
    assert not outcome(response_headers()).streamed


@pytest.mark.parametrize(
    "last",
    [
        [response_headers("200", end=True)],
        [response_headers(), response_body(b"{}", end=True)],
        [response_headers(), response_body(b"{}"), response_trailers()],
        [stream_headers(), response_body(b"data: 1\n\n", end=True)],
        [response_trailers()],
    ],
)
def test_the_end_is_told_exactly_once(last: list[Message]) -> None:
    driver = Driver().send(*ROUTED, *last).close().send(*last).close()
    assert driver.outcome.end is End.FINISHED


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [stream_headers()],
        [stream_headers(), response_body(b"data: 1\n\n")],
        [response_headers(), response_body(b"{")],
    ],
)
def test_a_stream_that_breaks_off_is_aborted_once(seen: list[Message]) -> None:
    driver = Driver().send(*ROUTED, *seen).close().close()
    assert driver.outcome.end is End.ABORTED
    assert driver.session.done


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [request_headers()],
        [request_headers(), request_body(b"{")],
        [request_headers(end=True)],
        [request_headers(end=True), response_headers(), response_body(b"{}", end=True)],
        [request_headers(LEAN)],
        [request_headers(LEAN), request_body(b"{}", end=True)],
        [response_headers(), response_body(b"{}")],
    ],
)
def test_what_was_never_routed_or_is_followed_by_the_access_log_has_no_end(messages: list[Message]) -> None:
    assert not [e for e in Driver().send(*messages).close().events if isinstance(e, Ended | FirstToken)]


@pytest.mark.parametrize(("status", "read"), [("200", 200), ("404", 404), ("503", 503), ("", 0), ("odd", 0)])
def test_the_pseudo_header_says_the_status(status: str, read: int) -> None:
    driver = Driver().send(*ROUTED, response_headers(status), response_body(b"{}", end=True))
    assert driver.outcome.status == read


def test_a_header_named_status_is_not_the_status() -> None:
    headers = response_headers("200")
    headers.response_headers.headers.headers.add(key="status", raw_value=b"500")
    assert Driver().send(*ROUTED, headers, response_body(b"{}", end=True)).outcome.status == 200


def test_a_reply_that_never_came_has_no_status() -> None:
    outcome = Driver().send(*ROUTED).close().outcome
    assert (outcome.status, outcome.ttft_ms, outcome.output_tokens, outcome.response_bytes) == (0, None, None, 0)


def test_times_run_from_when_the_request_was_sent_on() -> None:
    """One message is one second: routed at 2, headers at 3, first chunk at 4, last at 6."""
    driver = Driver().send(*ROUTED, stream_headers(), response_body(b"data: 1\n\n"), response_body(b"data: 2\n\n"))
    outcome = driver.send(response_body(b"data: 3\n\n", end=True)).outcome
    assert (outcome.ttft_ms, outcome.e2e_ms) == (2000.0, 4000.0)
    assert outcome.output_tokens == 3
    assert outcome.tpot_ms == 1000.0


def test_a_whole_reply_has_no_first_token_time() -> None:
    outcome = Driver().send(*ROUTED, response_headers(), response_body(b"{"), response_body(b"}", end=True)).outcome
    assert (outcome.ttft_ms, outcome.tpot_ms, outcome.e2e_ms) == (None, None, 3000.0)


USAGE = b'"usage": {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}'
WHOLE = b'{"choices": [{"text": "' + b"x" * 5000 + b'"}], ' + USAGE + b"}"


@pytest.mark.parametrize("cut", [1, 2000, 5001, len(WHOLE) - 40])
def test_usage_is_read_from_the_end_of_a_whole_reply(cut: int) -> None:
    driver = Driver().send(
        *ROUTED, response_headers(), response_body(WHOLE[:cut]), response_body(WHOLE[cut:], end=True)
    )
    outcome = driver.outcome
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (7, 5, 4)
    assert outcome.response_bytes == len(WHOLE)


def sse(count: int, *, usage: bool) -> bytes:
    events = [b'data: {"choices": [{"text": "a"}]}'] * count
    events += [b'data: {"choices": [], ' + USAGE + b"}"] if usage else []
    return b"".join(e + b"\n\n" for e in [*events, b"data: [DONE]"])


@pytest.mark.parametrize("chunk_bytes", [1, 7, 36, 100, 10_000])
def test_usage_at_the_end_of_a_stream_is_the_number_of_tokens(chunk_bytes: int) -> None:
    text = sse(9, usage=True)
    pieces = [response_body(text[i : i + chunk_bytes]) for i in range(0, len(text), chunk_bytes)]
    outcome = Driver().send(*ROUTED, stream_headers(), *pieces, response_body(b"", end=True)).outcome
    assert (outcome.prompt_tokens, outcome.output_tokens) == (7, 5)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 36, 100, 10_000])
def test_without_usage_each_event_but_the_last_is_a_token(chunk_bytes: int) -> None:
    """However the network cuts the stream, also in the middle of an event's mark."""
    text = sse(9, usage=False)
    pieces = [response_body(text[i : i + chunk_bytes]) for i in range(0, len(text), chunk_bytes)]
    outcome = Driver().send(*ROUTED, stream_headers(), *pieces, response_body(b"", end=True)).outcome
    assert outcome.output_tokens == 9


def test_a_text_that_looks_like_an_event_is_none() -> None:
    text = b'data: {"choices": [{"text": "data: x"}]}\n\n' * 9 + b"data: [DONE]\n\n"
    outcome = Driver().send(*ROUTED, stream_headers(), response_body(text, end=True)).outcome
    assert outcome.output_tokens == 9


def test_an_aborted_stream_counts_what_came() -> None:
    driver = Driver().send(*ROUTED, stream_headers(), response_body(b"data: 1\n\n"), response_body(b"data: 2\n\n"))
    assert driver.close().outcome.output_tokens == 2


@pytest.mark.parametrize("status", ["404", "503"])
def test_an_error_in_a_stream_is_no_token(status: str) -> None:
    outcome = Driver().send(*ROUTED, stream_headers(status), response_body(b"data: {}\n\n", end=True)).outcome
    assert outcome.output_tokens is None


# --- any order at all -------------------------------------------------------------------------------------------------

_texts = st.sampled_from(["", "0", "5", "200", "503", "text/event-stream", "application/json", "nonsense"])
_bytes = st.sampled_from(
    [b"", b"{}", b"data: 1\n\n", b"data: [DONE]\n\n", b'"usage": {"completion_tokens": 3}', b"x" * 70]
)


@st.composite
def any_message(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(["request_headers", "request_body", "request_trailers"]) | st.sampled_from(
        ["response_headers", "response_body", "response_trailers", ""]
    ))  # fmt: skip
    message, end = Message(), draw(st.booleans())
    if kind.endswith("headers"):
        names = draw(st.lists(st.sampled_from([":path", ":status", "content-length", "content-type"]), unique=True))
        http = ext_proc_pb2.HttpHeaders(headers=lines([(n, draw(_texts)) for n in names]), end_of_stream=end)
        getattr(message, kind).CopyFrom(http)
    elif kind.endswith("body"):
        getattr(message, kind).CopyFrom(ext_proc_pb2.HttpBody(body=draw(_bytes), end_of_stream=end))
    elif kind:
        getattr(message, kind).SetInParent()
    if draw(st.booleans()):
        with_subset(message, draw(st.sampled_from([["10.0.0.1"], [], "10.0.0.1,", 1.0, True])))
    return message


@fuzzed
@given(
    messages=st.lists(any_message(), max_size=12),
    mode=st.sampled_from([None, LEAN, DUPLEX, "NONE"]),
    closed=st.integers(0, 12),
)
def test_no_order_of_messages_crashes_or_routes_or_ends_twice(
    messages: list[Message], mode: str | None, closed: int
) -> None:
    driver = Driver(Session(64))
    for i, message in enumerate(messages):
        if i == closed:
            driver.close()
        driver.send(with_mode(message, mode) if i == 0 else message)
    driver.close().close()
    kinds = [type(e) for e in driver.events]
    assert kinds.count(Route) <= 1
    assert kinds.count(Ended) <= 1
    assert kinds.count(FirstToken) <= kinds.count(Ended)
    assert driver.session.done
    refusals = [i for i, s in enumerate(driver.shapes) if s.startswith("refused")]
    assert len(refusals) <= 1


# --- lean without the headers ----------------------------------------------------------------------------------------


def body_with_attributes(body: bytes, **attributes: str) -> Message:
    message = with_mode(request_body(body, end=True), LEAN)
    fields = message.attributes["envoy.filters.http.ext_proc"].fields
    for header, attribute in ATTRIBUTES.items():
        if header in attributes:
            fields[attribute].string_value = attributes[header]
    fields["request.something_else"].string_value = "ignored"
    return message


def test_headers_may_come_as_attributes_of_the_body() -> None:
    sent = {":path": "/v1/completions", "x-request-id": "theirs", "x-llm-d-slo-ttft-ms": "200"}
    driver = Driver().send(body_with_attributes(b"{}", **sent))
    (route,) = driver.routes
    assert (route.headers, route.body) == (sent, b"{}")
    assert "x-request-id" not in set_by(reply_of(driver, "request_body"))
    assert driver.session.done


@pytest.mark.parametrize(("sent", "may"), [(body_with_attributes(b"{}"), False), (request_headers(LEAN), True)])
def test_without_its_headers_a_request_may_not_be_rewritten(sent: Message, may: bool) -> None:
    (route,) = Driver().send(sent, request_body(b"{}", end=True)).routes
    assert route.may_rewrite is may
