"""The API, put together: ``create_app`` for clients, ``create_ops_app`` for probes and Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import Depends, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.middleware import Middleware

from batchgw.api.auth import Auth
from batchgw.api.batches import BatchRoutes, CreateBatch
from batchgw.api.docs import describe
from batchgw.api.edge import Edge, handle_errors
from batchgw.api.files import FileRoutes
from batchgw.api.intake import Intake
from batchgw.api.metrics import ApiMetrics, Measured
from batchgw.api.objects import BatchObject, DeletedFile, FileObject, ListObject, PartObject, UploadObject
from batchgw.api.settings import ApiSettings
from batchgw.api.traced import Traced
from batchgw.api.uploads import CompleteUpload, CreateUpload, UploadRoutes
from batchgw.blobs import Blobs
from batchgw.errors import ConfigError
from batchgw.store.base import Store, StoreError
from batchgw.tracing import Tracer

READY_S = 5.0
SHOWN = (
    *(FileObject, DeletedFile, ListObject[FileObject], UploadObject, PartObject, BatchObject, ListObject[BatchObject]),
    *(CreateBatch, CreateUpload, CompleteUpload),
)
"""What the OpenAPI page refers to."""


def create_app(
    settings: ApiSettings,
    store: Store,
    blobs: Blobs,
    *,
    metrics: ApiMetrics | None = None,
    serving: Callable[[], bool] = lambda: True,
    tracer: Tracer | None = None,
    clock: Callable[[], float] = time.time,
) -> FastAPI:
    """Store and blobs are the caller's to close. ConfigError for settings that do not go together.

    ``serving``: false makes it not ready, whatever its storage says.
    """
    try:
        settings.check()
    except ValueError as e:
        raise ConfigError(str(e), "$.api") from None
    app = FastAPI(
        title="batchgw",
        version=_version(),
        description="OpenAI's Files, Uploads and Batch API.",
        redirect_slashes=False,
        middleware=[  # outermost first
            Middleware(Measured, metrics or ApiMetrics(CollectorRegistry())),
            *([Middleware(Traced, tracer)] if tracer else ()),
            Middleware(Edge, settings.read_idle_s, settings.request_timeout_s),
        ],
    )
    handle_errors(app)
    intake = Intake(settings, store, blobs, clock)
    auth = [Depends(Auth(settings, store))]
    app.include_router(FileRoutes(intake, store, blobs).router(), dependencies=auth)
    app.include_router(UploadRoutes(settings, intake, store, blobs, clock).router(), dependencies=auth)
    app.include_router(BatchRoutes(settings, store, clock).router(), dependencies=auth)
    _add_probes(app, store, serving)
    app.openapi = lambda: describe(app, SHOWN)  # type: ignore[method-assign]
    return app


def create_ops_app(registry: CollectorRegistry, store: Store, serving: Callable[[], bool] = lambda: True) -> FastAPI:
    """``/health``, ``/ready`` and ``/metrics``."""
    app = FastAPI(title="batchgw operations", openapi_url=None)
    _add_probes(app, store, serving)

    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    app.add_api_route("/metrics", metrics, methods=["GET", "HEAD"])
    return app


def _add_probes(app: FastAPI, store: Store, serving: Callable[[], bool]) -> None:
    async def health() -> Response:
        return Response("OK", media_type="text/plain")

    async def ready() -> Response:
        try:
            async with asyncio.timeout(READY_S):
                await store.ping()
            is_ready = serving()
        except (StoreError, TimeoutError):
            is_ready = False
        return Response("ok" if is_ready else "not ready", 200 if is_ready else 503, media_type="text/plain")

    probe: dict[str, Any] = {"methods": ["GET", "HEAD"], "response_class": Response, "include_in_schema": False}
    app.add_api_route("/health", health, **probe)
    app.add_api_route("/ready", ready, **probe)


def _version() -> str:
    try:
        return version("llmd-sched")
    except PackageNotFoundError:
        return "0"
