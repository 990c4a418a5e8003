"""Metrics of the API; names and labels are the reference's."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ROUTE = re.compile(
    r"/v1/(?P<kind>files|batches|uploads)"
    r"(?:/(?P<id>[^/]+)(?P<verb>(?<=.)/(?:content|cancel|parts|complete))?)?"
)
_IDS = {"files": "{file_id}", "batches": "{batch_id}", "uploads": "{upload_id}"}
_PLAIN = frozenset({"/health", "/ready", "/metrics", "/docs", "/redoc", "/openapi.json"})
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})
OTHER = "other"


class ApiMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        named = ("method", "path", "status")
        self.requests = Counter("http_requests_total", "HTTP requests answered.", named, registry=registry)
        self.duration = Histogram(
            "http_request_duration_seconds", "From a request's head to its answer's end.", named, registry=registry
        )
        self.in_flight = Gauge("http_requests_in_flight", "HTTP requests now.", named[:2], registry=registry)


class Measured:
    """Counts what passes through; outermost, so that it sees every status."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._app, self._metrics, self._clock = app, metrics, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else OTHER
        path, status, start = template(scope["path"]), "500", self._clock()

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        with self._metrics.in_flight.labels(method, path).track_inprogress():
            try:
                await self._app(scope, receive, seen)
            finally:
                self._metrics.requests.labels(method, path, status).inc()
                self._metrics.duration.labels(method, path, status).observe(self._clock() - start)


def template(path: str) -> str:
    """The route's template, known before it is routed; one word for all that clients make up."""
    if path in _PLAIN:
        return path
    found = _ROUTE.fullmatch(path)
    if not found:
        return OTHER
    kind, verb = found["kind"], found["verb"] or ""
    return f"/v1/{kind}" + (f"/{_IDS[kind]}{verb}" if found["id"] else "")
