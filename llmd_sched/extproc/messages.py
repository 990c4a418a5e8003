"""Reading and building ext_proc messages. Pure functions of messages; the order of things is ``session``'s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from google.protobuf.struct_pb2 import Struct

from llmd_sched import headers as names
from llmd_sched.errors import RequestError
from llmd_sched.types import Decision
from llmd_sched.wire import core_pb2, ext_proc_pb2, http_status_pb2

ProcessingRequest = ext_proc_pb2.ProcessingRequest
ProcessingResponse = ext_proc_pb2.ProcessingResponse

CHUNK_BYTES = 62_000
"""Bodies are returned in pieces of at most this: the reference's limit, well under gRPC's own."""


def header_map(received: core_pb2.HeaderMap) -> dict[str, str]:
    """Lower-case name -> value; of several lines the last. For look-ups only: nothing is ever re-set from it."""
    return {h.key.lower(): h.raw_value.decode("utf-8", "replace") or h.value for h in received.headers}


ATTRIBUTES = {":path": "request.path"} | {n: f"request.headers['{n}']" for n in names.READ if n != ":path"}
"""Header -> the Envoy attribute (a CEL expression) that carries it when the headers themselves are not sent."""

_HEADER_OF = {attribute: header for header, attribute in ATTRIBUTES.items()}
_ATTRIBUTES_KEY = "envoy.filters.http.ext_proc"


def header_attribute(header: str) -> str:
    """The Envoy attribute that carries a request header."""
    return f"request.headers['{header}']"


def attribute_map(message: ext_proc_pb2.ProcessingRequest) -> dict[str, str]:
    """The headers that came as attributes; absent ones are not there."""
    if _ATTRIBUTES_KEY not in message.attributes:
        return {}
    fields = message.attributes[_ATTRIBUTES_KEY].fields
    return {header: value.string_value for name, value in fields.items() if (header := _header_of(name))}


def _header_of(attribute: str) -> str:
    """Empty for an attribute that is no header."""
    known = _HEADER_OF.get(attribute, "")
    if not known and attribute.startswith("request.headers['"):
        return attribute[len("request.headers['") : -len("']")]
    return known


PEER_ATTRIBUTE = "source.address"


def peer(message: ext_proc_pb2.ProcessingRequest) -> str:
    """``ip:port`` of the client, where the proxy was configured to tell; empty otherwise."""
    if _ATTRIBUTES_KEY not in message.attributes:
        return ""
    fields = message.attributes[_ATTRIBUTES_KEY].fields
    return fields[PEER_ATTRIBUTE].string_value if PEER_ATTRIBUTE in fields else ""


def whole_number(text: str) -> int | None:
    """A header's decimal number; None when it is not one of at most 18 plain digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def subset_hint(message: ext_proc_pb2.ProcessingRequest) -> frozenset[str] | None:
    """The ``ip:port`` or ``ip`` the proxy restricts us to, as a list or one comma-separated string; None without."""
    spaces = message.metadata_context.filter_metadata
    if names.NAMESPACE_SUBSET not in spaces:
        return None
    fields = spaces[names.NAMESPACE_SUBSET].fields
    if names.DESTINATION_SUBSET not in fields:
        return None
    value = fields[names.DESTINATION_SUBSET]
    if value.WhichOneof("kind") == "string_value":
        parts = value.string_value.split(",")
    else:
        parts = [v.string_value for v in value.list_value.values]
    return frozenset(p.strip() for p in parts if p.strip())


def set_headers(values: Mapping[str, str]) -> ext_proc_pb2.HeaderMutation:
    mutation = ext_proc_pb2.HeaderMutation()
    for key, value in values.items():
        header = mutation.set_headers.add().header
        header.key = key
        header.raw_value = value.encode()
    return mutation


def routing(mutation: ext_proc_pb2.HeaderMutation) -> ext_proc_pb2.CommonResponse:
    """The new destination only counts once Envoy looks for a route again."""
    return ext_proc_pb2.CommonResponse(header_mutation=mutation, clear_route_cache=True)


def decision_metadata(destination: str, decision: Decision | None, *, emit_scores: bool) -> Struct:
    """``envoy.lb`` for the proxy; ``llmd`` for the access log: our key of the request, and why it goes there."""
    metadata = Struct()
    lb = metadata.fields[names.NAMESPACE_LB].struct_value
    lb.fields[names.DESTINATION].string_value = destination
    if decision is None:
        return metadata
    if emit_scores:
        scores = lb.fields[names.DESTINATION_SCORES].struct_value
        for hostport, score in decision.scores.items():
            scores.fields[hostport].number_value = score
    ours = metadata.fields[names.NAMESPACE_OURS].struct_value.fields
    ours[names.TICKET].string_value = decision.ticket
    if decision.prediction is not None:
        ours["model_version"].number_value = decision.prediction.model_version
        ours["predicted_ttft_ms"].number_value = round(decision.prediction.ttft_ms, 3)
        ours["predicted_tpot_ms"].number_value = round(decision.prediction.tpot_ms, 3)
    if decision.reply_headers:
        # The lean path has no other way to a reply's headers than the Lua filter, which reads this.
        ours[names.REPLY_HEADERS].struct_value.update(dict(decision.reply_headers))
    return metadata


def streamed_body(body: bytes, *, end_of_stream: bool) -> Iterator[ext_proc_pb2.BodyResponse]:
    """``body`` in chunks; an empty body is one empty chunk. The end is marked on the last one only."""
    for at in range(0, max(1, len(body)), CHUNK_BYTES):
        piece = body[at : at + CHUNK_BYTES]
        reply = ext_proc_pb2.BodyResponse()
        streamed = reply.response.body_mutation.streamed_response
        streamed.body = piece
        streamed.end_of_stream = end_of_stream and at + CHUNK_BYTES >= len(body)
        yield reply


def refusal(error: RequestError) -> ext_proc_pb2.ProcessingResponse:
    response = ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.CopyFrom(http_status_pb2.HttpStatus(code=error.status))  # type: ignore[arg-type]
    immediate.body = error.body.encode()
    immediate.details = type(error).__name__
    headers = {"content-type": "text/plain"}
    if error.reason:
        headers[names.DROPPED_REASON] = error.reason
    immediate.headers.CopyFrom(set_headers(headers))
    return response
