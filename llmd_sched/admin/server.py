"""The admin port: metrics, and what the scheduler can say of itself.

    GET /healthz              open to all
    GET /metrics              Prometheus text
    GET /debug/plugins/state  what each plugin holds, bounded
    GET /debug/decisions      the last decisions, newest first; ?limit= ?endpoint= ?request_id=

It shares the event loop with decisions, so what takes long (a page of metrics, many decisions as JSON) is made in a
thread, one at a time. Errors are plain text that says what is accepted.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import ssl
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from llmd_sched.admin.auth import Authorize, bearer
from llmd_sched.admin.decisions import Decisions, Record
from llmd_sched.admin.dump import plugin_states
from llmd_sched.admin.metrics import MetricsPage
from llmd_sched.telemetry import CONTENT_TYPE

log = logging.getLogger(__name__)

Route = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_CONNECTIONS = 64
BACKLOG = 16
"""Also how far a burst of connections may go beyond the limit, being accepted before any of it is counted."""

IDLE_S = 30.0
"""A connection without a whole request is closed after this long; Prometheus asks every 15 s."""

REQUEST_S = 10.0
"""To authorize, answer and take the answer; Prometheus gives up then too."""

HANDSHAKE_S = 5.0
MAX_LINE_BYTES = 8190
MAX_HEADERS = 64
DEFAULT_LIMIT = 100
MAX_PAGE_BYTES = 16 << 20
OPEN = frozenset({"/healthz"})
QUERY = frozenset({"limit", "endpoint", "request_id"})

_TEXT = {"Content-Type": "text/plain; charset=utf-8"}
_REFUSED = b"too many connections\n"


class AdminServer:
    """Started, it serves. ``page`` makes the metrics page, in a thread. ``authorize`` None lets everybody in,
    ``ssl_context`` None serves plain HTTP.

    ``states`` is called on the event loop and returns ``{name: {"type": ..., "state" or "message": ...}}``. ``routes``
    are more GET handlers by path, behind the same authorization; those in ``patient`` bound their time themselves.
    """

    def __init__(
        self,
        page: Callable[[], bytes],
        *,
        decisions: Decisions | None = None,
        states: Callable[[], Mapping[str, Any]] = dict,
        authorize: Authorize | None = None,
        routes: Mapping[str, Route] | None = None,
        patient: Collection[str] = (),
        ssl_context: ssl.SSLContext | None = None,
        request_s: float = REQUEST_S,
    ) -> None:
        self._decisions = Decisions() if decisions is None else decisions
        self._states = states
        self._authorize = authorize
        self._ssl = ssl_context
        self._request_s = request_s
        self._patient = frozenset(patient)
        self._page = MetricsPage(page)
        self._telling = asyncio.Lock()
        self._stack = AsyncExitStack()
        self.routes: dict[str, Route] = {
            "/healthz": self._healthz,
            "/metrics": self._metrics,
            "/debug/plugins/state": self._plugins_state,
            "/debug/decisions": self._debug_decisions,
            **(routes or {}),
        }

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError when it cannot be had."""
        app = web.Application(middlewares=[self._answered])
        app.add_routes([web.get(path, handler, allow_head=False) for path, handler in self.routes.items()])
        runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=1.0,
            keepalive_timeout=IDLE_S,
            lingering_time=1.0,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
        )
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        try:
            listening = await self._listen(runner, host, port)
        except OSError as error:
            await self.stop()
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self._stack.callback(listening.close)
        bound = int(listening.sockets[0].getsockname()[1])
        log.info("metrics and debug on %s:%d (%s)", host, bound, "TLS" if self._ssl else "plain")
        return bound

    async def _listen(self, runner: web.AppRunner, host: str, port: int) -> asyncio.Server:
        http = runner.server
        assert http is not None

        def connection() -> asyncio.Protocol:
            return http() if len(http.connections) < MAX_CONNECTIONS else _Refused()

        handshake_s = HANDSHAKE_S if self._ssl else None
        loop = asyncio.get_running_loop()
        return await loop.create_server(
            connection, host, port, ssl=self._ssl, ssl_handshake_timeout=handshake_s, backlog=BACKLOG
        )

    async def stop(self) -> None:
        await self._stack.aclose()

    @web.middleware
    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Within the time limit: whether it may, the answer, and its way to the client."""
        response: web.StreamResponse = _text(503, f"not answered within {self._request_s:g} s")
        try:
            async with asyncio.timeout(None if request.path in self._patient else self._request_s):
                response = await self._answer(request, handler)
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if response.prepared and request.transport is not None:
                request.transport.abort()  # the client does not read, and would keep what is buffered for it
        except ConnectionError:
            pass  # the client went away
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            refusal = await self._refusal(request)
            return refusal if refusal is not None else await handler(request)
        except web.HTTPNotFound:
            return _text(404, f"no such page; there are {', '.join(self.routes)}")
        except web.HTTPMethodNotAllowed as error:
            return _text(
                405, f"{request.method} is not answered here, only GET", {"Allow": ",".join(error.allowed_methods)}
            )
        except web.HTTPException as error:
            return _text(error.status, error.text or error.reason)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return _text(500, "an internal error; the log says more")

    async def _refusal(self, request: web.Request) -> web.Response | None:
        """None when the request may be answered."""
        if request.body_exists:
            response = _text(413, "a request here has no body")
            response.force_close()
            return response
        if self._authorize is None or request.path in OPEN:
            return None
        token = bearer(request.headers.get("Authorization"))
        if token is None:
            return _text(401, "send Authorization: Bearer TOKEN", {"WWW-Authenticate": 'Bearer realm="metrics"'})
        try:
            allowed = await self._authorize(token)
        except Exception as error:
            log.error("nobody gets into the admin port, as tokens cannot be checked: %s", error)
            return _text(503, "tokens cannot be checked now")
        return None if allowed else _text(403, "this token does not open this port")

    async def _healthz(self, _: web.Request) -> web.Response:
        return _text(200, "ok")

    async def _metrics(self, request: web.Request) -> web.Response:
        accepted = {
            one.partition(";")[0].strip() for one in request.headers.get("Accept-Encoding", "").lower().split(",")
        }
        gzipped = "gzip" in accepted
        headers = {"Content-Type": CONTENT_TYPE} | ({"Content-Encoding": "gzip"} if gzipped else {})
        return web.Response(body=await self._page.render(gzipped), headers=headers)

    async def _plugins_state(self, _: web.Request) -> web.Response:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        return _json(msgspec.json.encode({"timestamp": now, "plugins": plugin_states(self._states())}))

    async def _debug_decisions(self, request: web.Request) -> web.Response:
        unknown = request.query.keys() - QUERY
        if unknown:
            raise web.HTTPBadRequest(text=f"{min(unknown)!r} is none of {', '.join(sorted(QUERY))}")
        records = self._decisions.newest(
            _limit(request.query.get("limit"), self._decisions.capacity),
            request.query.get("endpoint"),
            request.query.get("request_id"),
        )
        async with self._telling:
            return _json(await asyncio.to_thread(_told, records))


class _Refused(asyncio.Protocol):
    """A connection beyond the limit is told so."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(_REFUSED)}\r\nConnection: close\r\n\r\n"
        cast(asyncio.WriteTransport, transport).write(head.encode() + _REFUSED)  # no subclass of it in uvloop
        transport.close()


def _limit(text: str | None, most: int) -> int:
    if text is None:
        return min(DEFAULT_LIMIT, most)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise web.HTTPBadRequest(text=f"limit={text[:40]!r} is not a whole number from 1 to {most}")
    return int(text)


def _told(records: list[Record]) -> bytes:
    """The newest ones, until MAX_PAGE_BYTES are full."""
    told: list[msgspec.Raw] = []
    room = MAX_PAGE_BYTES
    for record in records:
        text = msgspec.json.encode(record.as_json(), enc_hook=str)
        told.append(msgspec.Raw(text))
        room -= len(text)
        if room < 0:
            break
    return msgspec.json.encode({"decisions": told, "truncated": len(told) < len(records)})


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


def _text(status: int, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(text=text + "\n", status=status, headers={**_TEXT, **(headers or {})})
