"""One ext_proc stream as a state machine: messages in, events out; no I/O, no clock.

One stream is one HTTP request. Envoy says in the first message how it will send the bodies, and that decides the path.

Lean (request BUFFERED, response not sent)

    request_headers    -> an empty reply, or Route when there is no body. May be left out: then the few headers we
                          read come as attributes with the body, which saves half the messages.
    request_body       -> Route; when routed, the destination as header mutation and metadata in the body reply.
                          Nothing follows: what became of the request comes with the access log.

Duplex (both bodies FULL_DUPLEX_STREAMED; also assumed when Envoy does not say)

    request_headers    -> nothing yet (the reply is deferred), or Route when there is no body
    request_body ...   -> collected; at its end Route; when routed, the headers reply, then the body in chunks
    request_trailers   -> ends a body that was not ended; answered after it
    response_headers   -> a marker header, and those the decision adds
    response_body ...  -> echoed at once; the first is FirstToken, the last Ended
    response_trailers  -> answered; Ended

A stream that stops anywhere else was aborted: ``peer_closed`` tells. ``Ended`` comes exactly once for a routed duplex
request and never on the lean path.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import msgspec
from google.protobuf.struct_pb2 import Struct

from llmd_sched import headers as names
from llmd_sched.errors import PayloadTooLarge, RequestError, UnsupportedMode
from llmd_sched.extproc import messages
from llmd_sched.extproc.messages import ProcessingRequest, ProcessingResponse
from llmd_sched.extproc.reply import NameBack, ReplyReader
from llmd_sched.types import Decision, End, Endpoint, Outcome
from llmd_sched.wire import ext_proc_pb2, processing_mode_pb2

_Mode = processing_mode_pb2.ProcessingMode


class Path(enum.Enum):
    LEAN = "lean"
    DUPLEX = "duplex"


class Route(msgspec.Struct, frozen=True):
    """The request is here in full: choose an endpoint, then call ``routed``, ``routed_blindly`` or ``refused``."""

    headers: Mapping[str, str]
    body: bytes | None
    """None for a request without a body."""
    subset: frozenset[str] | None
    peer: str = ""
    """Address of the client, where the proxy tells (attribute ``source.address``)."""
    may_rewrite: bool = True
    """False when the headers were not sent: then no header mutation is applied, and content-length is what it was."""


class FirstToken(msgspec.Struct, frozen=True):
    """The first byte of a successful streamed reply."""


class Ended(msgspec.Struct, frozen=True):
    outcome: Outcome
    reply: bytes = b""
    """The beginning of it as it came, where that was to be kept."""


Event: TypeAlias = ext_proc_pb2.ProcessingResponse | Route | FirstToken | Ended


class Session:
    """``receive``, ``routed``, ``refused`` and ``peer_closed`` return what follows from them, in order."""

    def __init__(
        self,
        max_body_bytes: int,
        *,
        honour_subset: bool = True,
        emit_scores: bool = False,
        ours: Sequence[str] = (),
        report: Callable[[Outcome], Struct | None] = lambda outcome: None,
        keep_reply: bool = False,
    ) -> None:
        """``ours``: request headers only we may set, taken off when the decision does not set them. ``report``: what
        to tell the proxy, as dynamic metadata, of a reply that has ended."""
        self.path = Path.DUPLEX
        self.done = False
        """Everything is answered; the driver closes the stream."""
        self._max_body_bytes = max_body_bytes
        self._honour_subset = honour_subset
        self._emit_scores = emit_scores
        self._ours = ours
        self._report = report
        self._keep_reply = keep_reply
        self._reply_headers: Mapping[str, str] = {}
        self._first = True
        self._has_headers = False
        self._headers: dict[str, str] = {}
        self._peer = ""
        self._chunks: list[bytes] = []
        self._size_bytes = 0
        self._route_asked = False
        self._has_trailers = False
        self._reply: ReplyReader | None = None
        self._name_back: NameBack | None = None

    @property
    def streaming(self) -> bool:
        """A streamed reply is coming through."""
        return self._reply is not None and self._reply.streaming

    def receive(self, message: ext_proc_pb2.ProcessingRequest, now_s: float) -> list[Event]:
        kind = message.WhichOneof("request")
        if kind is None or self.done:
            return []
        try:
            if self._first:
                self._first = False
                self._learn_path(message)
            return _RECEIVE[kind](self, message, now_s)
        except RequestError as error:
            return self.refused(error)

    def _learn_path(self, message: ext_proc_pb2.ProcessingRequest) -> None:
        if not message.HasField("protocol_config"):
            return
        mode = message.protocol_config.request_body_mode
        if mode == _Mode.BUFFERED:
            self.path = Path.LEAN
        elif mode != _Mode.FULL_DUPLEX_STREAMED:
            raise UnsupportedMode(
                f"request_body_mode {_Mode.BodySendMode.Name(mode)} is not supported; "
                "configure ext_proc with FULL_DUPLEX_STREAMED (duplex path) or BUFFERED (lean path)"
            )

    def _request_headers(self, message: ext_proc_pb2.ProcessingRequest, now_s: float) -> list[Event]:
        if self._has_headers or self._route_asked:
            return []
        self._has_headers = True
        received = message.request_headers
        self._headers = messages.header_map(received.headers)
        self._peer = messages.peer(message)
        if received.end_of_stream:
            return [self._ask_route(message, None)]
        self._check_size(messages.whole_number(self._headers.get(names.CONTENT_LENGTH, "")) or 0)
        if self.path is Path.LEAN:
            return [ProcessingResponse(request_headers=ext_proc_pb2.HeadersResponse())]
        return []

    def _request_body(self, message: ext_proc_pb2.ProcessingRequest, now_s: float) -> list[Event]:
        if self._route_asked:
            return []
        if not self._has_headers:
            self._headers = messages.attribute_map(message)
        chunk = message.request_body
        body = chunk.body  # every look at the field makes a copy
        self._size_bytes += len(body)
        self._check_size(self._size_bytes)
        self._chunks.append(body)
        if self.path is Path.DUPLEX and not chunk.end_of_stream:
            return []
        return [self._ask_route(message, b"".join(self._chunks))]

    def _request_trailers(self, message: ext_proc_pb2.ProcessingRequest, now_s: float) -> list[Event]:
        trailers = ProcessingResponse(request_trailers=ext_proc_pb2.TrailersResponse())
        if self._route_asked:
            return [trailers]
        self._has_trailers = True
        return [self._ask_route(message, b"".join(self._chunks))]

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_body_bytes:
            raise PayloadTooLarge(f"request body of {size_bytes} bytes exceeds the limit of {self._max_body_bytes}")

    def _ask_route(self, message: ext_proc_pb2.ProcessingRequest, body: bytes | None) -> Route:
        self._route_asked = True
        self._chunks.clear()
        subset = messages.subset_hint(message) if self._honour_subset else None
        return Route(self._headers, body, subset, self._peer or messages.peer(message), may_rewrite=self._has_headers)

    def routed(
        self,
        decision: Decision,
        body: bytes,
        now_s: float,
        *,
        body_changed: bool = False,
        remove: Sequence[str] = (),
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> list[Event]:
        """The replies that send the request on. ``body`` is what goes upstream, ``remove`` are headers that do not,
        ``headers`` are set beside the decision's."""
        headers = {names.DESTINATION: decision.destination, **headers, **decision.headers}
        if not self._headers.get(names.REQUEST_ID):
            headers[names.REQUEST_ID] = decision.request.id
        if self.path is Path.DUPLEX or body_changed:
            headers[names.CONTENT_LENGTH] = str(len(body))
        common = messages.routing(messages.set_headers(headers))
        common.header_mutation.remove_headers.extend(n for n in (*self._ours, *remove) if n not in headers)
        metadata = messages.decision_metadata(decision.destination, decision, emit_scores=self._emit_scores)
        if self.path is Path.LEAN:
            self.done = True
            if body_changed:
                common.body_mutation.body = body
            reply = ext_proc_pb2.BodyResponse(response=common)
            return [ProcessingResponse(request_body=reply, dynamic_metadata=metadata)]
        self._reply_headers = decision.reply_headers
        self._reply = ReplyReader(streaming=decision.request.streaming, sent_s=now_s, keep=self._keep_reply)
        asked, target = decision.request.model, decision.request.target_model
        self._name_back = NameBack(target, asked) if asked and asked != target else None
        replies: list[Event] = [
            ProcessingResponse(request_headers=ext_proc_pb2.HeadersResponse(response=common), dynamic_metadata=metadata)
        ]
        pieces = messages.streamed_body(body, end_of_stream=not self._has_trailers)
        replies += [ProcessingResponse(request_body=piece) for piece in pieces]
        if self._has_trailers:
            replies.append(ProcessingResponse(request_trailers=ext_proc_pb2.TrailersResponse()))
        return replies

    def routed_blindly(self, endpoint: Endpoint, request_id: str) -> list[Event]:
        """The reply for a request without a body; nobody follows what becomes of it."""
        headers = {names.DESTINATION: endpoint.hostport}
        if not self._headers.get(names.REQUEST_ID):
            headers[names.REQUEST_ID] = request_id
        reply = ext_proc_pb2.HeadersResponse(response=messages.routing(messages.set_headers(headers)))
        metadata = messages.decision_metadata(endpoint.hostport, None, emit_scores=False)
        self.done = self.path is Path.LEAN
        return [ProcessingResponse(request_headers=reply, dynamic_metadata=metadata)]

    def refused(self, error: RequestError) -> list[Event]:
        self.done = True
        return [messages.refusal(error)]

    def _response_headers(self, message: ext_proc_pb2.ProcessingRequest, now_s: float) -> list[Event]:
        received = message.response_headers
        reply = ext_proc_pb2.HeadersResponse()
        added = {names.WENT_INTO_RESPONSE: "true", **self._reply_headers}
        reply.response.header_mutation.CopyFrom(messages.set_headers(added))
        events: list[Event] = [ProcessingResponse(response_headers=reply)]
        if self._reply is not None:
            self._reply.headers(messages.header_map(received.headers))
        return events + (self._end(now_s) if received.end_of_stream else [])

    def _response_body(self, message: ext_proc_pb2.ProcessingRequest, now_s: float) -> list[Event]:
        chunk = message.response_body
        body = chunk.body
        events: list[Event] = []
        if self._reply is not None and body and self._reply.body(body, now_s):
            events.append(FirstToken())
        if self._name_back is not None:
            body = self._name_back.feed(body, end=chunk.end_of_stream)
        pieces = messages.streamed_body(body, end_of_stream=chunk.end_of_stream)
        events += [ProcessingResponse(response_body=piece) for piece in pieces]
        return self._with_end(events, now_s) if chunk.end_of_stream else events

    def _response_trailers(self, message: ext_proc_pb2.ProcessingRequest, now_s: float) -> list[Event]:
        events: list[Event] = []
        held = self._name_back.feed(b"", end=True) if self._name_back is not None else b""
        if held:
            pieces = messages.streamed_body(held, end_of_stream=False)
            events += [ProcessingResponse(response_body=piece) for piece in pieces]
        events.append(ProcessingResponse(response_trailers=ext_proc_pb2.TrailersResponse()))
        return self._with_end(events, now_s)

    def _with_end(self, events: list[Event], now_s: float) -> list[Event]:
        """``events`` and the end; the last reply carries what is reported of it."""
        ended = self._end(now_s)
        for one in ended:
            metadata = self._report(one.outcome)
            if metadata is not None and isinstance(events[-1], ProcessingResponse):
                events[-1].dynamic_metadata.CopyFrom(metadata)
        return [*events, *ended]

    def _end(self, now_s: float) -> list[Ended]:
        self.done = True
        return self._outcome(End.FINISHED, now_s)

    def peer_closed(self, now_s: float, end: End = End.ABORTED) -> list[Ended]:
        """The stream is gone. On the duplex path a routed request that had not ended was aborted, or ``end``ed."""
        self.done = True
        return self._outcome(end, now_s)

    def _outcome(self, end: End, now_s: float) -> list[Ended]:
        reply, self._reply = self._reply, None
        return [] if reply is None else [Ended(reply.outcome(end, now_s), bytes(reply.kept))]


_RECEIVE: dict[str, Callable[[Session, ProcessingRequest, float], list[Event]]] = {
    "request_headers": Session._request_headers,
    "request_body": Session._request_body,
    "request_trailers": Session._request_trailers,
    "response_headers": Session._response_headers,
    "response_body": Session._response_body,
    "response_trailers": Session._response_trailers,
}
