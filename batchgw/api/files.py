"""/v1/files."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from batchgw.api.auth import tenant_of
from batchgw.api.bodies import expiry_of_form
from batchgw.api.docs import FILE_FORM, returns
from batchgw.api.forms import OVERHEAD_BYTES, Event, Field, FileStart, content, events, too_large
from batchgw.api.intake import Intake, Received
from batchgw.api.objects import DeletedFile, FileObject, ListObject, of_file, reply
from batchgw.api.pages import After, Order, bad_cursor, list_of, page_of
from batchgw.blobs import BlobMissing, Blobs
from batchgw.errors import Conflict, InvalidRequest, MissingParameter, NotFound, RangeNotSatisfiable
from batchgw.records import File
from batchgw.store.base import FileInUse, Files, StoreUnavailable, UnknownCursor

UPLOAD_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
Purpose = Literal[
    "assistants",
    "assistants_output",
    "batch",
    "batch_output",
    "fine-tune",
    "fine-tune-results",
    "vision",
    "user_data",
    "evals",
]
MAX_LISTED = 10_000

Tenant = Annotated[str, Depends(tenant_of)]
FileId = Annotated[str, Path(max_length=100)]

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class FileRoutes:
    def __init__(self, intake: Intake, files: Files, blobs: Blobs) -> None:
        self._intake, self._files, self._blobs = intake, files, blobs

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/files", tags=["Files"])
        router.add_api_route("", self.create, methods=["POST"], openapi_extra=FILE_FORM, **returns(FileObject))
        router.add_api_route("", self.list, methods=["GET"], **returns(ListObject[FileObject]))
        router.add_api_route("/{file_id}", self.retrieve, methods=["GET"], **returns(FileObject))
        router.add_api_route("/{file_id}", self.delete, methods=["DELETE"], **returns(DeletedFile))
        router.add_api_route("/{file_id}/content", self.content, methods=["GET"], response_class=Response)
        return router

    async def create(self, request: Request, tenant: Tenant) -> Response:
        """Upload a file. Batch input is checked line by line while it arrives."""
        largest = self._intake.limit_bytes(None)
        sent = int(request.headers.get("content-length", "0"))
        if sent > largest + OVERHEAD_BYTES:
            raise too_large(largest)
        await self._intake.check_room(tenant, 0)
        form = events(request.stream(), request.headers.get("content-type", ""), largest)
        upload = _Upload(self._intake, tenant)
        try:
            async for event in form:
                await upload.take(event, form)
            file = await upload.file()
            await self._files.add_file(file)
        except StoreUnavailable:
            raise  # it may have been added all the same: a file must not lose its bytes
        except BaseException:
            await upload.discard()
            raise
        return reply(of_file(file))

    async def list(
        self,
        tenant: Tenant,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
        order: Order = "desc",
        purpose: Purpose | None = None,
    ) -> Response:
        """List files."""
        try:
            listed = await self._files.files(tenant, purpose, page_of(after, limit, order))
        except UnknownCursor:
            raise bad_cursor(after) from None
        return reply(list_of(listed, of_file, none=""))

    async def retrieve(self, tenant: Tenant, file_id: FileId) -> Response:
        """A file's metadata."""
        return reply(of_file(await self._file(tenant, file_id)))

    async def delete(self, tenant: Tenant, file_id: FileId) -> Response:
        """Delete a file that no unfinished batch reads."""
        try:
            file = await self._files.remove_file(tenant, file_id)
        except FileInUse as e:
            raise Conflict(
                f"File {file_id} is the input of batch {e.batch_id}, which is not over; cancel it or wait for its end.",
                "file_id",
                "file_in_use",
            ) from None
        if file is None:
            raise unknown_file(file_id)
        await self._intake.delete(file.blob, file.plan_blob)
        return reply(DeletedFile(file.id))

    async def content(self, request: Request, tenant: Tenant, file_id: FileId) -> Response:
        """A file's bytes, or one range of them."""
        file = await self._file(tenant, file_id)
        asked = request.headers.get("range", "")
        if request.headers.get("if-range", _tag(file)) != _tag(file):
            asked = ""
        start, stop = range_of(asked, file.bytes) or (0, file.bytes)
        pieces = self._blobs.stream(file.blob, start, stop)
        try:
            first = await anext(pieces, b"")
        except BlobMissing:
            raise NotFound(f"The content of file {file_id} is gone", "file_id") from None
        headers = {
            "accept-ranges": "bytes",
            "content-length": str(stop - start),
            "content-disposition": disposition(file.filename),
            "etag": _tag(file),
        }
        partial = bool(range_of(asked, file.bytes))
        if partial:
            headers["content-range"] = f"bytes {start}-{stop - 1}/{file.bytes}"
        body = _joined(first, pieces)
        return StreamingResponse(body, 206 if partial else 200, headers, media_type="application/octet-stream")

    async def _file(self, tenant: str, file_id: str) -> File:
        file = await self._files.file(tenant, file_id)
        if file is None:
            raise unknown_file(file_id)
        return file


class _Upload:
    """The state of one form: its fields, and its file once received."""

    def __init__(self, intake: Intake, tenant: str) -> None:
        self._intake, self._tenant = intake, tenant
        self._fields: dict[str, str] = {}
        self._filename = ""
        self._received: Received | None = None

    async def take(self, event: Event, form: AsyncIterator[Event]) -> None:
        match event:
            case Field(name="purpose"):
                self._fields["purpose"] = checked_purpose(event.value)
            case Field():
                self._fields[event.name] = event.value
            case FileStart(name="file") if self._received is None:
                self._filename = event.filename
                purpose = self._fields.get("purpose")
                self._received = await self._intake.receive(
                    self._tenant,
                    event.filename,
                    content(form),
                    self._intake.limit_bytes(purpose),
                    scanned=purpose in (None, "batch"),
                )
            case FileStart():
                raise InvalidRequest("The form must have one file, in its field 'file'", event.name[:80] or "file")
            case _:
                raise AssertionError(event)

    async def file(self) -> File:
        """Raises InvalidRequest, OverQuota."""
        purpose = self._fields.get("purpose")
        if purpose is None:
            raise MissingParameter("purpose", f"accepted: {', '.join(UPLOAD_PURPOSES)}")
        if self._received is None:
            raise MissingParameter("file", "the form has no file of that name")
        limit = self._intake.limit_bytes(purpose)
        if self._received.bytes > limit:
            raise too_large(limit)
        await self._intake.check_room(self._tenant, self._received.bytes)
        expires_s = expiry_of_form(self._fields)
        return await self._intake.file(self._received, self._tenant, purpose, self._filename, expires_s)

    async def discard(self) -> None:
        if self._received is not None:
            await self._intake.discard(self._received, self._tenant)


def checked_purpose(purpose: str) -> str:
    """Raises InvalidRequest."""
    if purpose not in UPLOAD_PURPOSES:
        raise InvalidRequest(
            f"Invalid value for 'purpose': {purpose[:80]!r}; accepted: {', '.join(UPLOAD_PURPOSES)}", "purpose"
        )
    return purpose


def unknown_file(file_id: str) -> NotFound:
    return NotFound(f"File with ID {file_id} not found", "file_id")


def range_of(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None: the whole file (no range, or one in a form that may be ignored).

    Raises RangeNotSatisfiable.
    """
    found = _RANGE.fullmatch(header.strip())
    if not found or found[0] == "bytes=-":
        return None
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < int(first):
        return None
    if start >= size or stop <= start:
        raise RangeNotSatisfiable(
            f"No byte of {header.strip()!r} exists: the file has {size}.",
            "range",
            headers={"content-range": f"bytes */{size}"},
        )
    return start, stop


def disposition(filename: str) -> str:
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in filename)
    encoded = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{encoded}'


def _tag(file: File) -> str:
    """Contents never change under an id."""
    return f'"{file.id}"'


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
