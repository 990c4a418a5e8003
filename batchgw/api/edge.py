"""The edge of the API: request ids, security headers, time limits, and errors as OpenAI's envelope."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Mapping
from typing import cast

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchgw.blobs import BlobError
from batchgw.errors import Internal, InvalidRequest, MethodNotAllowed, MissingParameter, NotFound, Refusal, TooSlow
from batchgw.errors import Unavailable as UnavailableRefusal
from batchgw.store.base import StoreError

SECURITY = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "x-xss-protection": "1; mode=block"}
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = logging.getLogger(__name__)


def envelope(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    error = {"message": refusal.message, "type": refusal.type, "param": refusal.param, "code": refusal.code}
    content = msgspec.json.encode({"error": error})
    return Response(content, refusal.status, {**refusal.headers, **(headers or {})}, media_type="application/json")


class Edge:
    """Around all routes. ``idle_s``: how long a client may pause while it sends or reads; ``total_s``: all it has."""

    def __init__(self, app: ASGIApp, idle_s: float, total_s: float) -> None:
        self._app, self._idle_s, self._total_s = app, idle_s, total_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        started = False

        async def bounded_receive() -> Message:
            try:
                async with asyncio.timeout(self._idle_s):
                    return await receive()
            except TimeoutError:
                raise TooSlow(f"Nothing of the request came for {self._idle_s:g} seconds.") from None

        async def dressed_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update({"x-request-id": request_id, **SECURITY})
            async with asyncio.timeout(self._idle_s):
                await send(message)

        try:
            async with asyncio.timeout(self._total_s):
                await self._answer(scope, bounded_receive, dressed_send)
        except ClientDisconnect:
            log.info("request %s: the client went away", request_id)
        except Exception as e:
            if started:
                log.warning("request %s was cut off: %r", request_id, e)
                raise
            await envelope(self._fault(e, request_id))(scope, bounded_receive, dressed_send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "OPTIONS":
            await Response(status_code=204)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _fault(self, error: Exception, request_id: str) -> Refusal:
        """What no handler foresaw."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, TimeoutError):
            return TooSlow(f"The request took longer than {self._total_s:g} seconds.")
        log.error("request %s failed", request_id, exc_info=error)
        return Internal("The server had an error while processing your request. Sorry about that!", request_id)


def handle_errors(app: FastAPI) -> None:
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unrouted)
    app.add_exception_handler(StoreError, _unavailable)
    app.add_exception_handler(BlobError, _unavailable)


async def _refused(request: Request, error: Exception) -> Response:
    return envelope(cast("Refusal", error))


async def _invalid(request: Request, error: Exception) -> Response:
    """A query or path parameter that FastAPI refused: the first of them."""
    first = cast("RequestValidationError", error).errors()[0]
    param = str(first["loc"][-1])
    if first["type"] == "missing":
        return envelope(MissingParameter(param, "it has no default"))
    given = str(first.get("input"))[:80]
    return envelope(InvalidRequest(f"Invalid value for '{param}': {given!r}; {first['msg']}", param))


async def _unrouted(request: Request, error: Exception) -> Response:
    refused = cast("HTTPException", error)
    where = f"{request.method} {request.url.path[:200]}"
    if refused.status_code == 405:
        allowed = dict(refused.headers or {})
        return envelope(MethodNotAllowed(f"Method not allowed: {where}"), allowed)
    return envelope(NotFound(f"Unknown request URL: {where}", code="unknown_url"))


async def _unavailable(request: Request, error: Exception) -> Response:
    log.warning("storage failed: %s", error)
    return envelope(UnavailableRefusal("The storage of the gateway does not answer now; please try again."))
