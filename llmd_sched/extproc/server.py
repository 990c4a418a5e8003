"""The grpc.aio shell: ext_proc and access-log streams on one port, for both data paths at once.

gRPC method handlers move bytes; ``session`` and ``accesslog`` understand them; ``service`` decides. Service names are
Envoy's, so no generated stubs are needed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import msgspec
from grpc import aio

from llmd_sched.errors import RequestError
from llmd_sched.extproc.accesslog import read_entry
from llmd_sched.extproc.messages import ProcessingRequest, ProcessingResponse
from llmd_sched.extproc.service import EndpointPicker
from llmd_sched.extproc.session import Ended, Event, FirstToken, Path, Route, Session
from llmd_sched.types import End, Outcome
from llmd_sched.wire import als_pb2

log = logging.getLogger(__name__)

EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"
ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"

GRPC_OVERHEAD_BYTES = 1 << 20
"""A message holds a whole body on the lean path, and its headers."""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    max_body_bytes: int = 8 << 20
    honour_subset: bool = True
    emit_scores: bool = False

    @property
    def grpc_options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", self.max_body_bytes + GRPC_OVERHEAD_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", 100_000),
        ]


def handlers(process: Any, access_logs: Any) -> tuple[grpc.GenericRpcHandler, grpc.GenericRpcHandler]:
    """Both of Envoy's services, answered by these coroutine functions."""
    ext_proc = grpc.stream_stream_rpc_method_handler(
        process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
    )
    logs = grpc.stream_unary_rpc_method_handler(
        access_logs, als_pb2.StreamAccessLogsMessage.FromString, als_pb2.StreamAccessLogsResponse.SerializeToString
    )
    return (
        grpc.method_handlers_generic_handler(EXT_PROC, {"Process": ext_proc}),
        grpc.method_handlers_generic_handler(ACCESS_LOG, {"StreamAccessLogs": logs}),
    )


class ExtProcServer:
    """Adds both services to a grpc.aio server."""

    def __init__(self, picker: EndpointPicker, settings: ServerSettings) -> None:
        self.picker = picker
        self.settings = settings
        self.open_streams = 0

    def add_to(self, server: aio.Server) -> None:
        server.add_generic_rpc_handlers(handlers(self.process, self.access_logs))

    async def process(self, _: AsyncIterator[Any], context: aio.ServicerContext[Any, Any]) -> None:
        """One HTTP request."""
        settings = self.settings
        stream = _Stream(
            self.picker,
            Session(settings.max_body_bytes, honour_subset=settings.honour_subset, emit_scores=settings.emit_scores),
        )
        self.open_streams += 1
        try:
            while not stream.session.done and (message := await context.read()) is not aio.EOF:
                for reply in stream.receive(message):
                    await context.write(reply)
                stream.delivered = True
        finally:
            self.open_streams -= 1
            stream.closed()

    async def access_logs(
        self, messages: AsyncIterator[als_pb2.StreamAccessLogsMessage], context: aio.ServicerContext[Any, Any]
    ) -> als_pb2.StreamAccessLogsResponse:
        """Envoy keeps one such stream open and writes to it in batches."""
        async for message in messages:
            for entry in message.http_logs.log_entry:
                read = read_entry(entry)
                if read is not None:
                    self.picker.finish(*read)
        return als_pb2.StreamAccessLogsResponse()


class _Stream:
    """A session and the decision made for it."""

    def __init__(self, picker: EndpointPicker, session: Session) -> None:
        self.picker = picker
        self.session = session
        self.ticket: str | None = None
        self.delivered = True
        """Envoy has all our replies so far."""

    def receive(self, message: ProcessingRequest) -> list[ProcessingResponse]:
        self.delivered = False
        return self._replies(self.session.receive(message, self.picker.clock()))

    def _replies(self, events: list[Event]) -> list[ProcessingResponse]:
        replies: list[ProcessingResponse] = []
        for event in events:
            if isinstance(event, ProcessingResponse):
                replies.append(event)
            elif isinstance(event, Route):
                replies += self._replies(self._route(event))
            elif self.ticket is not None:
                self._tell(event, self.ticket)
        return replies

    def _route(self, route: Route) -> list[Event]:
        try:
            if route.body is None:
                return self.session.routed_blindly(*self.picker.route_blindly(route))
            decision, body, changed = self.picker.route(route, route.body)
        except RequestError as error:
            return self.session.refused(error)
        self.ticket = decision.ticket
        if self.session.path is Path.LEAN:
            self.picker.expect_first_token(decision)
        return self.session.routed(decision, body, self.picker.clock(), body_changed=changed)

    def _tell(self, event: FirstToken | Ended, ticket: str) -> None:
        if isinstance(event, FirstToken):
            self.picker.first_token(ticket)
        else:
            self.picker.finish(ticket, event.outcome)

    def closed(self) -> None:
        """Exactly once, whatever happened: an open request that nobody will report on is given back now."""
        self._replies(self.session.peer_closed(self.picker.clock()))
        if self.ticket is not None and self.session.path is Path.LEAN and not self.delivered:
            # Envoy never saw the ticket, so no access-log entry will carry it.
            self.picker.finish(self.ticket, Outcome(end=End.ABORTED))
