"""A span for each request that creates a batch, or that comes within a trace."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchgw.api.metrics import template
from batchgw.tracing import Tracer

CREATES = ("POST", "/v1/batches")
OURS = (b"traceparent", b"tracestate")


class Traced:
    """What is behind it sees a ``traceparent`` that names the span; a batch that is created keeps that one."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app, self._tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope) if scope["type"] == "http" else Headers()
        traceparent, creates = given.get("traceparent"), (scope.get("method"), scope.get("path")) == CREATES
        if not creates and (scope["type"] != "http" or traceparent is None):
            await self._app(scope, receive, send)
            return
        name, status = f"{scope['method']} {template(scope['path'])}", 500
        span = self._tracer.request(name, traceparent, given.get("tracestate"))

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if span.traceparent is not None:
            others = [(key, value) for key, value in scope["headers"] if key not in OURS]
            scope = {**scope, "headers": [*others, (b"traceparent", span.traceparent.encode())]}
        try:
            await self._app(scope, receive, seen)
        finally:
            span.end({"http.response.status_code": status}, error=str(status) if status >= 500 else "")
