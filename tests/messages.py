"""ext_proc messages as Envoy sends them, and what the replies to them say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import json_format

from llmd_sched.wire import accesslog_pb2, core_pb2, ext_proc_pb2, processing_mode_pb2

Message = ext_proc_pb2.ProcessingRequest
Reply = ext_proc_pb2.ProcessingResponse

MODES = processing_mode_pb2.ProcessingMode.BodySendMode
LEAN, DUPLEX = "BUFFERED", "FULL_DUPLEX_STREAMED"

BODY = {"model": "m", "prompt": "hello", "max_tokens": 5}
RAW = json.dumps(BODY).encode()

# --- the request ------------------------------------------------------------------------------------------------------


def lines(values: Mapping[str, str] | Sequence[tuple[str, str]]) -> core_pb2.HeaderMap:
    pairs = values.items() if isinstance(values, Mapping) else values
    return core_pb2.HeaderMap(headers=[core_pb2.HeaderValue(key=k, raw_value=v.encode()) for k, v in pairs])


def with_mode(message: Message, mode: str | None) -> Message:
    if mode is not None:
        message.protocol_config.request_body_mode = MODES.Value(mode)
    return message


def request_headers(
    mode: str | None = DUPLEX, end: bool = False, path: str = "/v1/completions", **values: str
) -> Message:
    """``content_length="5"`` becomes the header ``content-length``."""
    fields = {":path": path, ":method": "POST"} | {k.replace("_", "-"): v for k, v in values.items()}
    http = ext_proc_pb2.HttpHeaders(headers=lines(fields), end_of_stream=end)
    return with_mode(Message(request_headers=http), mode)


def request_body(body: bytes, end: bool = False) -> Message:
    return Message(request_body=ext_proc_pb2.HttpBody(body=body, end_of_stream=end))


def request_trailers() -> Message:
    return Message(request_trailers=ext_proc_pb2.HttpTrailers(trailers=lines({"x-checksum": "1"})))


def with_subset(message: Message, value: Any, namespace: str = "envoy.lb.subset_hint") -> Message:
    fields = message.metadata_context.filter_metadata[namespace]
    fields.update({"x-gateway-destination-endpoint-subset": value})
    return message


def with_attributes(message: Message, values: Mapping[str, str]) -> Message:
    """What Envoy's ``request_attributes`` add, such as ``source.address``."""
    message.attributes["envoy.filters.http.ext_proc"].update(values)
    return message


def reference_headers(mode: str = DUPLEX, end: bool = False, **values: str) -> Message:
    """As in the reference's tests."""
    return request_headers(mode, end, **{"hi": "mom", "x_request_id": "test-request-id", **values})


def asked(mode: str = DUPLEX, data: bytes = RAW, subset: Any = None, **values: str) -> tuple[Message, Message]:
    """A whole request."""
    body = request_body(data, end=True)
    return reference_headers(mode, **values), body if subset is None else with_subset(body, subset)


# --- its reply --------------------------------------------------------------------------------------------------------


def response_headers(status: str = "200", content_type: str = "application/json", end: bool = False) -> Message:
    values = {":status": status, "content-type": content_type}
    return Message(response_headers=ext_proc_pb2.HttpHeaders(headers=lines(values), end_of_stream=end))


def stream_headers(status: str = "200") -> Message:
    return response_headers(status, "text/event-stream; charset=utf-8")


def response_body(body: bytes, end: bool = False) -> Message:
    return Message(response_body=ext_proc_pb2.HttpBody(body=body, end_of_stream=end))


def response_trailers() -> Message:
    return Message(response_trailers=ext_proc_pb2.HttpTrailers(trailers=lines({"grpc-status": "0"})))


def answered(data: bytes = b"{}") -> tuple[Message, Message]:
    """A whole reply that is no stream."""
    return response_headers(), response_body(data, end=True)


def entry(ticket: str, **noted: Any) -> accesslog_pb2.HTTPAccessLogEntry:
    """An access-log entry of a request that took a second, with what the Lua filter ``noted``."""
    made = accesslog_pb2.HTTPAccessLogEntry()
    common = made.common_properties
    common.start_time.seconds = 1_760_000_000
    common.duration.seconds = 1
    common.access_log_type = accesslog_pb2.DownstreamEnd
    common.metadata.filter_metadata["llmd"].update({"ticket": ticket, **noted})
    made.response.response_code.value = 200
    return made


# --- what the scheduler's replies say ---------------------------------------------------------------------------------


def kinds(replies: Sequence[Reply]) -> list[str]:
    return [reply.WhichOneof("response") or "" for reply in replies]


def mutation_of(reply: Reply) -> ext_proc_pb2.HeaderMutation:
    kind = reply.WhichOneof("response")
    assert kind
    if kind == "immediate_response":
        return reply.immediate_response.headers
    mutation: ext_proc_pb2.HeaderMutation = getattr(reply, kind).response.header_mutation
    return mutation


def set_by(reply: Reply) -> dict[str, str]:
    """Header name -> value of everything the reply sets; no name twice."""
    told = mutation_of(reply).set_headers
    names = [h.header.key for h in told]
    assert len(names) == len(set(names))
    return {h.header.key: h.header.raw_value.decode() for h in told}


def removed_by(reply: Reply) -> list[str]:
    return list(mutation_of(reply).remove_headers)


def streamed(replies: Sequence[Reply], kind: str) -> tuple[bytes, list[bool]]:
    """All bytes of the body replies of this kind, and the end marks one by one."""
    pieces = [
        getattr(r, kind).response.body_mutation.streamed_response for r in replies if r.WhichOneof("response") == kind
    ]
    return b"".join(p.body for p in pieces), [p.end_of_stream for p in pieces]


def metadata_of(reply: Reply) -> dict[str, Any]:
    """Its dynamic metadata, by namespace."""
    return json_format.MessageToDict(reply.dynamic_metadata)


def routing_reply(replies: Sequence[Reply]) -> Reply:
    """The one that says where the request goes."""
    (reply,) = [r for r in replies if "x-gateway-destination-endpoint" in metadata_of(r).get("envoy.lb", {})]
    return reply


def destination(replies: Sequence[Reply]) -> str:
    """Where the request goes, from header and metadata, which must agree."""
    reply = routing_reply(replies)
    told = set_by(reply)["x-gateway-destination-endpoint"]
    assert reply.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"] == told
    return told


def refused(replies: Sequence[Reply]) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of the refusal, which must be the last reply."""
    (reply,) = [r for r in replies if r.WhichOneof("response") == "immediate_response"]
    assert reply is replies[-1]
    immediate = reply.immediate_response
    return int(immediate.status.code), immediate.body.decode(), set_by(reply)
