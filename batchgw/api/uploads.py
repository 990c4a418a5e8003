"""/v1/uploads: a file in parts, put together in the order the client names."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Path, Request, Response

from batchgw.api.auth import tenant_of
from batchgw.api.bodies import ExpiresAfter, expiry_s, read_json
from batchgw.api.docs import PART_FORM, body, returns
from batchgw.api.files import checked_purpose
from batchgw.api.forms import Event, Field, FileStart, clean, content, events, too_large
from batchgw.api.intake import Intake
from batchgw.api.objects import PartObject, UploadObject, of_part, of_upload, reply
from batchgw.api.settings import ApiSettings
from batchgw.blobs import Blobs, BlobTooLarge, key
from batchgw.errors import InvalidRequest, MissingParameter, NotFound
from batchgw.records import Part, Upload
from batchgw.store.base import Files, StoreUnavailable

MAX_PARTS = 10_000

Tenant = Annotated[str, Depends(tenant_of)]
UploadId = Annotated[str, Path(max_length=100)]


class CreateUpload(msgspec.Struct, frozen=True):
    purpose: str
    filename: str
    bytes: int
    mime_type: str
    expires_after: ExpiresAfter | None = None


class CompleteUpload(msgspec.Struct, frozen=True):
    part_ids: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]
    md5: str | None = None


class UploadRoutes:
    def __init__(
        self, settings: ApiSettings, intake: Intake, files: Files, blobs: Blobs, clock: Callable[[], float]
    ) -> None:
        self._settings, self._intake, self._files, self._blobs, self._clock = settings, intake, files, blobs, clock

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/uploads", tags=["Uploads"])
        shown = returns(UploadObject)
        router.add_api_route("", self.create, methods=["POST"], openapi_extra=body(CreateUpload), **shown)
        complete = body(CompleteUpload)
        router.add_api_route(
            "/{upload_id}/parts", self.part, methods=["POST"], openapi_extra=PART_FORM, **returns(PartObject)
        )
        router.add_api_route("/{upload_id}/complete", self.complete, methods=["POST"], openapi_extra=complete, **shown)
        router.add_api_route("/{upload_id}/cancel", self.cancel, methods=["POST"], **shown)
        return router

    async def create(self, request: Request, tenant: Tenant) -> Response:
        """Announce a file that comes in parts."""
        asked = await read_json(request, CreateUpload, self._settings.max_body_bytes)
        purpose = checked_purpose(asked.purpose)
        limit = self._intake.limit_bytes(purpose)
        if not 0 < asked.bytes <= limit:
            raise InvalidRequest(f"Invalid value for 'bytes': {asked.bytes}; 1 to {limit} are accepted", "bytes")
        if not (filename := clean(asked.filename)):
            raise InvalidRequest("Invalid value for 'filename': a file name is expected", "filename")
        expiry_s(asked.expires_after)
        await self._intake.check_room(tenant, asked.bytes)
        now_s = self._clock()
        upload = Upload(
            id=f"upload_{uuid.uuid4().hex}",
            tenant=tenant,
            purpose=purpose,
            filename=filename,
            bytes=asked.bytes,
            mime_type=asked.mime_type[:255],
            created_s=now_s,
            expires_s=now_s + self._settings.upload_expires_after_s,
        )
        await self._files.add_upload(upload)
        return reply(of_upload(upload))

    async def part(self, request: Request, tenant: Tenant, upload_id: UploadId) -> Response:
        """Add a part; parts may come in any order, and at the same time."""
        upload = await self._pending(tenant, upload_id)
        await self._check_parts(upload)
        limit = self._settings.max_part_bytes
        part: Part | None = None
        form = events(request.stream(), request.headers.get("content-type", ""), limit)
        try:
            async for event in form:
                part = await self._take(event, form, upload, part)
            if part is None:
                raise MissingParameter("data", "the form has no file of that name")
            if not await self._files.add_part(part):
                raise not_pending(upload_id, "over")
        except BaseException:
            await self._intake.delete(part.blob if part else None)
            raise
        return reply(of_part(part))

    async def _take(self, event: Event, form: AsyncIterator[Event], upload: Upload, part: Part | None) -> Part | None:
        match event:
            case Field():
                return part
            case FileStart(name="data") if part is None:
                part_id = f"part_{uuid.uuid4().hex}"
                blob = key(upload.tenant, part_id)
                limit = self._settings.max_part_bytes
                try:
                    size = await self._blobs.put(blob, content(form), limit)
                except BlobTooLarge:
                    raise too_large(limit) from None
                return Part(part_id, upload.id, self._clock(), size, blob)
            case _:
                raise InvalidRequest("The form must have one file, in its field 'data'", "data")

    async def complete(self, request: Request, tenant: Tenant, upload_id: UploadId) -> Response:
        """Make the file. Asking again for one that is complete gives it again."""
        asked = await read_json(request, CompleteUpload, self._settings.max_body_bytes)
        upload = await self._upload(tenant, upload_id)
        if upload.status == "completed" and upload.file_id:
            return reply(of_upload(upload, await self._files.file(tenant, upload.file_id)))
        upload = await self._pending(tenant, upload_id)
        parts = chosen(await self._files.parts(upload_id), asked.part_ids, upload.bytes)
        digest = hashlib.md5(usedforsecurity=False)
        received = await self._intake.receive(
            tenant,
            upload.filename,
            self._joined(parts, digest.update),
            self._intake.limit_bytes(upload.purpose),
            scanned=upload.purpose == "batch",
        )
        try:
            if asked.md5 is not None and asked.md5.lower() != digest.hexdigest():
                raise InvalidRequest(f"md5 is {asked.md5[:80]!r}, but the parts give {digest.hexdigest()}", "md5")
            await self._intake.check_room(tenant, received.bytes)
            file = await self._intake.file(received, tenant, upload.purpose, upload.filename, None)
            done = await self._files.end_upload(tenant, upload_id, "completed", file)
            if done is None:
                raise not_pending(upload_id, "over")
        except StoreUnavailable:
            raise  # it may have ended all the same: a file must not lose its bytes
        except BaseException:
            await self._intake.discard(received, tenant)
            raise
        return reply(of_upload(done, file))

    async def cancel(self, tenant: Tenant, upload_id: UploadId) -> Response:
        """Give up an upload; no more parts are taken."""
        upload = await self._upload(tenant, upload_id)
        if upload.status == "cancelled":
            return reply(of_upload(upload))
        await self._pending(tenant, upload_id)
        done = await self._files.end_upload(tenant, upload_id, "cancelled")
        if done is None:
            raise not_pending(upload_id, "over")
        return reply(of_upload(done))

    async def _joined(self, parts: Sequence[Part], seen: Callable[[bytes], None]) -> AsyncIterator[bytes]:
        for part in parts:
            async for piece in self._blobs.stream(part.blob):
                seen(piece)
                yield piece

    async def _check_parts(self, upload: Upload) -> None:
        """What is stored for one upload is bounded: by twice its size, as a part may be sent again."""
        parts = await self._files.parts(upload.id)
        if len(parts) >= MAX_PARTS or sum(part.bytes for part in parts) > 2 * upload.bytes:
            raise InvalidRequest(f"Upload {upload.id} has more parts than it may: {len(parts)}", "data")

    async def _upload(self, tenant: str, upload_id: str) -> Upload:
        upload = await self._files.upload(tenant, upload_id)
        if upload is None:
            raise NotFound(f"Upload with ID {upload_id} not found", "upload_id")
        return upload

    async def _pending(self, tenant: str, upload_id: str) -> Upload:
        upload = await self._upload(tenant, upload_id)
        if upload.status != "pending":
            raise not_pending(upload_id, upload.status)
        if upload.expires_s <= self._clock():
            raise not_pending(upload_id, "expired")
        return upload


def chosen(parts: Sequence[Part], part_ids: Sequence[str], size: int) -> list[Part]:
    """Raises InvalidRequest: unknown or repeated parts, or not ``size`` bytes in all."""
    by_id = {part.id: part for part in parts}
    for part_id in part_ids:
        if part_id not in by_id:
            raise InvalidRequest(f"part_ids names {part_id[:80]!r}, which is no part of this upload", "part_ids")
    if len(set(part_ids)) < len(part_ids):
        raise InvalidRequest("part_ids names a part more than once", "part_ids")
    found = [by_id[part_id] for part_id in part_ids]
    given = sum(part.bytes for part in found)
    if given != size:
        raise InvalidRequest(
            f"The parts have {given} bytes in all, but the upload was announced with {size}", "part_ids"
        )
    return found


def not_pending(upload_id: str, status: str) -> InvalidRequest:
    return InvalidRequest(f"Upload {upload_id} is {status}; only a pending one takes this", "upload_id", "upload_ended")
