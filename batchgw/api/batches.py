"""/v1/batches."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Request, Response

from batchgw.api.auth import tenant_of
from batchgw.api.bodies import ExpiresAfter, expiry_s, read_json
from batchgw.api.docs import body, returns
from batchgw.api.objects import BatchObject, ListObject, of_batch, reply
from batchgw.api.pages import After, Order, bad_cursor, list_of, page_of
from batchgw.api.settings import ApiSettings
from batchgw.api.windows import window_s
from batchgw.errors import Conflict, InvalidRequest, NotFound, OverQuota
from batchgw.lines import ENDPOINTS, refusals
from batchgw.records import Batch, File
from batchgw.seal import Seal
from batchgw.store.base import Page, Store, UnknownCursor

MAX_LISTED = 100
MAX_METADATA_KEYS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
MAX_IDEMPOTENCY_CHARS = 255
MAX_HEADER_CHARS = 8192

Tenant = Annotated[str, Depends(tenant_of)]
BatchId = Annotated[str, Path(max_length=100)]

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e]*")


class CreateBatch(msgspec.Struct, frozen=True):
    completion_window: str
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchRoutes:
    def __init__(self, settings: ApiSettings, store: Store, clock: Callable[[], float]) -> None:
        self._settings, self._store, self._clock = settings, store, clock
        self._seal = Seal(settings.header_keys)
        self._endpoints = (*ENDPOINTS, *settings.extra_endpoints)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/batches", tags=["Batches"])
        shown = returns(BatchObject)
        router.add_api_route("", self.create, methods=["POST"], openapi_extra=body(CreateBatch), **shown)
        router.add_api_route("", self.list, methods=["GET"], **returns(ListObject[BatchObject]))
        router.add_api_route("/{batch_id}", self.retrieve, methods=["GET"], **shown)
        router.add_api_route("/{batch_id}/cancel", self.cancel, methods=["POST"], **shown)
        return router

    async def create(self, request: Request, tenant: Tenant) -> Response:
        """Run the requests of an uploaded file. One whose lines cannot run turns ``failed``, with the reasons."""
        asked = await read_json(request, CreateBatch, self._settings.max_body_bytes)
        window = self._window_s(asked.completion_window)
        self._check_endpoint(asked.endpoint)
        check_metadata(asked.metadata)
        output_expires_after_s = expiry_s(asked.output_expires_after, "output_expires_after")
        idempotency_key = self._idempotency_key(request)
        headers = self._pass_through(request)
        file = await self._input(tenant, asked.input_file_id)
        now_s = self._clock()
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            tenant=tenant,
            endpoint=asked.endpoint,
            input_file_id=file.id,
            completion_window=asked.completion_window,
            created_s=now_s,
            deadline_s=now_s + window,
            metadata=asked.metadata,
            total=file.scan.lines if file.scan else 0,
            errors=refusals(file.scan, asked.endpoint) if file.scan else (),
            output_expires_after_s=output_expires_after_s,
            headers=self._seal.seal(headers) if headers else None,
            trace=trace_of(request),
            idempotency_key=idempotency_key,
        )
        return reply(of_batch(await self._add(batch)))

    async def _add(self, batch: Batch) -> Batch:
        """The batch, or the older one of its idempotency key. Raises Conflict, OverQuota."""
        try:
            await self._check_quotas(batch)
        except OverQuota:
            older = await self._older(batch)
            if older is None:
                raise
        else:
            older = await self._store.add_batch(batch)
        same = ("endpoint", "input_file_id", "completion_window", "metadata", "output_expires_after_s")
        for name in same:
            if getattr(older, name) != getattr(batch, name):
                raise Conflict(
                    f"Idempotency-Key {batch.idempotency_key!r} made batch {older.id}, which differs in {name}.",
                    "Idempotency-Key",
                    "idempotency_key_reused",
                )
        return older

    async def _older(self, batch: Batch) -> Batch | None:
        """Where a quota is used up, a repeated request must still get what it made; looked for in the newest."""
        if batch.idempotency_key is None:
            return None
        newest = await self._store.batches(batch.tenant, Page(limit=MAX_LISTED))
        return next((one for one in newest.items if one.idempotency_key == batch.idempotency_key), None)

    async def list(
        self,
        tenant: Tenant,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
        order: Order = "desc",
    ) -> Response:
        """List batches."""
        try:
            listed = await self._store.batches(tenant, page_of(after, limit, order))
        except UnknownCursor:
            raise bad_cursor(after) from None
        return reply(list_of(listed, of_batch))

    async def retrieve(self, tenant: Tenant, batch_id: BatchId) -> Response:
        """A batch and how far it is."""
        batch = await self._store.batch(tenant, batch_id)
        if batch is None:
            raise unknown_batch(batch_id)
        return reply(of_batch(batch))

    async def cancel(self, tenant: Tenant, batch_id: BatchId) -> Response:
        """Stop a batch; lines that have an answer keep it."""
        batch = await self._store.cancel_batch(tenant, batch_id, self._clock())
        if batch is None:
            raise unknown_batch(batch_id)
        if batch.status in ("cancelling", "cancelled"):
            return reply(of_batch(batch))
        ending = "" if batch.ending in (None, batch.status) else f" (about to be {batch.ending})"
        raise InvalidRequest(
            f"Batch with status {batch.status}{ending} cannot be cancelled", "batch_id", "batch_not_cancellable"
        )

    def _window_s(self, text: str) -> float:
        least, most = self._settings.min_window_s, self._settings.max_window_s
        try:
            window = window_s(text)
        except ValueError as e:
            raise InvalidRequest(f"Invalid value for 'completion_window': {e}", "completion_window") from None
        if not least <= window <= most:
            raise InvalidRequest(
                f"Invalid value for 'completion_window': {text!r}; {least:g} to {most:g} seconds are accepted",
                "completion_window",
            )
        return window

    def _check_endpoint(self, endpoint: str) -> None:
        if endpoint not in self._endpoints:
            accepted = ", ".join(self._endpoints)
            raise InvalidRequest(f"Invalid value for 'endpoint': {endpoint[:80]!r}; accepted: {accepted}", "endpoint")

    async def _input(self, tenant: str, file_id: str) -> File:
        """400, not 404, for an unknown one, as in OpenAI's API."""
        file = await self._store.file(tenant, file_id)
        if file is None:
            raise InvalidRequest(f"Input file with ID '{file_id[:100]}' not found", "input_file_id", "file_not_found")
        if file.purpose != "batch":
            raise InvalidRequest(
                f"Input file {file.id} has the purpose {file.purpose!r}; 'batch' is accepted", "input_file_id"
            )
        return file

    async def _check_quotas(self, batch: Batch) -> None:
        quotas = self._settings.quotas
        if quotas.open_batches and await self._store.open_batches(batch.tenant) >= quotas.open_batches:
            raise OverQuota(
                f"At most {quotas.open_batches} batches may be unfinished at a time; wait for one to end.",
                code="open_batches_quota_exceeded",
            )
        if quotas.queued_lines:
            queued = await self._store.queued_lines(batch.tenant)
            if queued + batch.total > quotas.queued_lines:
                raise OverQuota(
                    f"At most {quotas.queued_lines} requests may wait; {queued} do, and this batch has {batch.total}.",
                    code="queued_lines_quota_exceeded",
                )

    def _idempotency_key(self, request: Request) -> str | None:
        given = request.headers.get("idempotency-key")
        if given is not None and not 0 < len(given) <= MAX_IDEMPOTENCY_CHARS:
            raise InvalidRequest(
                f"The header Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_CHARS} characters", "Idempotency-Key"
            )
        return given

    def _pass_through(self, request: Request) -> dict[str, str]:
        """The last value of each configured header. Raises InvalidRequest for what could forge another header."""
        found: dict[str, str] = {}
        for name in self._settings.pass_through_headers:
            values = request.headers.getlist(name)
            if not values:
                continue
            if len(values[-1]) > MAX_HEADER_CHARS or not _FIELD_VALUE.fullmatch(values[-1]):
                raise InvalidRequest(
                    f"The header {name} must be printable ASCII of at most {MAX_HEADER_CHARS} characters", name
                )
            found[name] = values[-1]
        return found


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Lengths count characters, as OpenAI's do. Raises InvalidRequest."""
    if metadata is None:
        return
    if len(metadata) > MAX_METADATA_KEYS:
        raise InvalidRequest(f"metadata has {len(metadata)} keys; at most {MAX_METADATA_KEYS} are accepted", "metadata")
    for name, value in metadata.items():
        if len(name) > MAX_KEY_CHARS:
            raise InvalidRequest(
                f"metadata has the key {name[:MAX_KEY_CHARS]!r}...; keys have at most {MAX_KEY_CHARS} characters",
                "metadata",
            )
        if len(value) > MAX_VALUE_CHARS:
            raise InvalidRequest(
                f"metadata.{name} has {len(value)} characters; at most {MAX_VALUE_CHARS} are accepted",
                f"metadata.{name}",
            )


def trace_of(request: Request) -> str | None:
    """The W3C traceparent, if it is one."""
    given = request.headers.get("traceparent", "")
    return given if _TRACEPARENT.fullmatch(given) else None


def unknown_batch(batch_id: str) -> NotFound:
    return NotFound(f"Batch with ID {batch_id} not found", "batch_id")
