"""The grpc.aio shell: ext_proc and access-log streams on one port, for both data paths at once.

gRPC method handlers move bytes; ``session`` and ``accesslog`` understand them; ``service`` decides. Service names are
Envoy's, so no generated stubs are needed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import msgspec
from grpc import aio

from llmd_sched.errors import Evicted, RequestError
from llmd_sched.extproc.accesslog import read_entry
from llmd_sched.extproc.messages import ProcessingRequest, ProcessingResponse
from llmd_sched.extproc.service import EndpointPicker, path_of
from llmd_sched.extproc.session import Ended, Event, FirstToken, Path, Route, Session
from llmd_sched.telemetry.instruments import Bins
from llmd_sched.types import End, Outcome
from llmd_sched.wire import accesslog_pb2, als_pb2

log = logging.getLogger(__name__)

EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"
ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"

MAX_STREAMS = 100_000
"""At once, of one connection of Envoy's; flow control lets requests wait in theirs."""
GRPC_OVERHEAD_BYTES = 1 << 20
"""A message holds a whole body on the lean path, and its headers."""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    max_body_bytes: int = 8 << 20
    honour_subset: bool = True
    emit_scores: bool = False
    stream_metrics: bool = False
    """Count streams and how long they last."""
    own_headers: tuple[str, ...] = ()
    """Request headers nobody but us may set."""

    @property
    def grpc_options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", self.max_body_bytes + GRPC_OVERHEAD_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            # By default gRPC cancels some at random once 1000 have come that we have not begun with: a 500 each.
            ("grpc.server.max_pending_requests", MAX_STREAMS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_STREAMS),
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
        self.failed_entries = 0
        self._streams: dict[str, _Stream] = {}
        """Ticket -> its stream on the duplex path, where a request under way can be ended."""

    def add_to(self, server: aio.Server) -> None:
        server.add_generic_rpc_handlers(handlers(self.process, self.access_logs))

    async def process(self, _: AsyncIterator[Any], context: aio.ServicerContext[Any, Any]) -> None:
        """One HTTP request."""
        stream = _Stream(self.picker, self._session(), context)
        self.open_streams += 1
        began_s, code = time.perf_counter(), "CANCELLED"
        try:
            while not stream.session.done and (message := await stream.read()) is not aio.EOF:
                stream.delivered = False
                for reply in await stream.receive(message):
                    await context.write(reply)
                stream.delivered = True
                if stream.ticket is not None and stream.session.path is Path.DUPLEX:
                    self._streams[stream.ticket] = stream
            for reply in stream.last_words:
                await context.write(reply)
            code = "OK"
        finally:
            self.open_streams -= 1
            if self.settings.stream_metrics:
                self._observe_stream(began_s, code)
            self._streams.pop(stream.ticket or "", None)
            stream.closed()

    def _observe_stream(self, began_s: float, code: str) -> None:
        telemetry = self.picker.observer.telemetry
        telemetry.gauge("extproc_streams_inflight").labels().set(self.open_streams)
        telemetry.histogram("extproc_stream_duration_seconds").labels().observe(time.perf_counter() - began_s)
        telemetry.counter("extproc_streams_total").labels(code).inc()

    def _session(self) -> Session:
        settings = self.settings
        return Session(
            settings.max_body_bytes,
            honour_subset=settings.honour_subset,
            emit_scores=settings.emit_scores,
            ours=settings.own_headers,
            report=self.picker.report,
            keep_reply=self.picker.learns_replies,
        )

    def evict(self, ticket: str) -> bool:
        """End a request that is under way, with 429. False when it cannot be: it has ended, or is on the lean path."""
        stream = self._streams.pop(ticket, None)
        if stream is None or stream.session.done:
            return False
        stream.evict()
        return True

    def _finish(self, entry: accesslog_pb2.HTTPAccessLogEntry) -> None:
        """One entry that blows up must not take the rest of its batch with it: nobody sends that again."""
        try:
            read = read_entry(entry)
            if read is not None:
                self.picker.finish(*read)
        except Exception:
            self.failed_entries += 1
            log.exception("an access-log entry could not be used (%d so far)", self.failed_entries)

    async def access_logs(
        self, messages: AsyncIterator[als_pb2.StreamAccessLogsMessage], context: aio.ServicerContext[Any, Any]
    ) -> als_pb2.StreamAccessLogsResponse:
        """Envoy keeps one such stream open and writes to it in batches."""
        async for message in messages:
            for entry in message.http_logs.log_entry:
                self._finish(entry)
        return als_pb2.StreamAccessLogsResponse()


class _Stream:
    """A session and the decision made for it."""

    def __init__(self, picker: EndpointPicker, session: Session, context: aio.ServicerContext[Any, Any]) -> None:
        self.picker = picker
        self.session = session
        self.ticket: str | None = None
        self.delivered = True
        """Envoy has all our replies so far."""
        self.last_words: Sequence[ProcessingResponse] = ()
        """To be sent before the stream ends, of a request that was evicted."""
        self._context = context
        self._reader: asyncio.Task[Any] | None = None
        """Who waits for Envoy's next message, while somebody does."""
        self._path = ""
        self._itl_s: Bins | None = None
        self._last_chunk_s: float | None = None
        self._reply_cost_s = 0.0

    async def read(self) -> Any:
        """Envoy's next message; EOF when there is none, or an eviction has put an end to it."""
        self._reader = asyncio.current_task()
        try:
            return await self._context.read()
        except asyncio.CancelledError:
            if not self.last_words or (self._reader is not None and self._reader.uncancel()):
                raise  # Envoy has left
            return aio.EOF
        finally:
            self._reader = None

    async def receive(self, message: ProcessingRequest) -> list[ProcessingResponse]:
        began_s = time.perf_counter()
        events = self.session.receive(message, self.picker.clock())
        if len(events) == 1 and isinstance(events[0], Route):
            replies = self._replies(await self._route(events[0]))
            self.picker.observer.telemetry.request_processing_s.observe(time.perf_counter() - began_s)
            return replies
        replies = self._replies(events)
        if self.ticket is not None:
            self._time_reply(message, began_s)
        return replies

    def _time_reply(self, message: ProcessingRequest, began_s: float) -> None:
        """Of the duplex path: the gaps between a stream's chunks, and what its messages cost together."""
        if self.session.streaming and message.HasField("response_body"):
            if self._last_chunk_s is not None and self._itl_s is not None:
                self._itl_s.observe(began_s - self._last_chunk_s)
            self._last_chunk_s = began_s
        self._reply_cost_s += time.perf_counter() - began_s
        if self.session.done:
            self.picker.observer.telemetry.response_processing_s.observe(self._reply_cost_s)

    def _replies(self, events: Sequence[Event]) -> list[ProcessingResponse]:
        """What to send; what there is to tell is told."""
        replies: list[ProcessingResponse] = []
        for event in events:
            if isinstance(event, ProcessingResponse):
                replies.append(event)
            elif isinstance(event, Route):
                raise AssertionError("a route is asked for alone")
            elif self.ticket is not None:
                self._tell(event, self.ticket)
        return replies

    async def _route(self, route: Route) -> list[Event]:
        try:
            if route.body is None:
                return self.session.routed_blindly(*self.picker.route_blindly(route))
            decision, body, changed, remove, headers = await self.picker.route(route, route.body)
        except RequestError as error:
            return self.session.refused(error)
        self.ticket = decision.ticket
        if self.session.path is Path.LEAN:
            self.picker.router.assume_first_token(decision)
        self._path = path_of(route.headers)
        self._itl_s = self.picker.observer.series(decision.request).itl_s
        now_s = self.picker.clock()
        return self.session.routed(decision, body, now_s, body_changed=changed, remove=remove, headers=headers)

    def _tell(self, event: FirstToken | Ended, ticket: str) -> None:
        if isinstance(event, FirstToken):
            self.picker.first_token(ticket)
        else:
            self.picker.learn(ticket, self._path, event)
            self.picker.finish(ticket, event.outcome)

    def evict(self) -> None:
        """It has ended for us. The loop that reads the stream says so to Envoy, since only one may write at a time."""
        self._replies(self.session.peer_closed(self.picker.clock(), End.EVICTED))
        self.last_words = self._replies(self.session.refused(Evicted()))
        if self._reader is not None:
            self._reader.cancel()

    def closed(self) -> None:
        """Exactly once, whatever happened: an open request that nobody will report on is given back now."""
        self._replies(self.session.peer_closed(self.picker.clock()))
        if self.ticket is not None and self.session.path is Path.LEAN and not self.delivered:
            # Envoy never saw the ticket, so no access-log entry will carry it.
            self.picker.finish(self.ticket, Outcome(end=End.ABORTED))
