"""Taking a file in: bytes go to the blob store while they are read as batch input; all of it is kept, or nothing."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable

import msgspec

from batchgw.api.forms import too_large
from batchgw.api.settings import ApiSettings
from batchgw.blobs import BlobError, Blobs, BlobTooLarge, key
from batchgw.errors import OverQuota
from batchgw.lines import ENDPOINTS, Limits, Plan, Scanner
from batchgw.records import File, Scan
from batchgw.store.base import Files

SCAN_BYTES = 256 << 10
"""Read in a thread at once: longer would keep the event loop waiting for the interpreter, shorter cost more hops."""
DISCARD_S = 30.0

_EXTENSION = re.compile(r".*(\.[A-Za-z0-9]{1,10})", re.DOTALL)

log = logging.getLogger(__name__)


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that are stored, but belong to no file yet; ``scan`` and ``plan`` where they were read as batch input."""

    id: str
    blob: str
    bytes: int
    scan: Scan | None = None
    plan: Plan | None = None


class Intake:
    def __init__(self, settings: ApiSettings, files: Files, blobs: Blobs, clock: Callable[[], float]) -> None:
        self._settings, self._files, self._blobs, self._clock = settings, files, blobs, clock
        self._limits = Limits(
            endpoints=(*ENDPOINTS, *settings.extra_endpoints),
            max_lines=settings.max_line_count,
            max_line_bytes=settings.max_line_bytes,
        )

    def limit_bytes(self, purpose: str | None) -> int:
        """None: not known yet."""
        batch, other = self._settings.max_batch_file_bytes, self._settings.max_file_bytes
        return max(batch, other) if purpose is None else batch if purpose == "batch" else other

    async def check_room(self, tenant: str, more_bytes: int) -> None:
        """Raises OverQuota."""
        quota = self._settings.quotas.stored_bytes
        if not quota:
            return
        stored = await self._files.stored_bytes(tenant)
        if stored + more_bytes > quota:
            raise OverQuota(
                f"Files may hold {quota} bytes in all; {stored} are stored, this file has {more_bytes}.",
                "file",
                "stored_bytes_quota_exceeded",
            )

    async def receive(
        self, tenant: str, filename: str, data: AsyncIterator[bytes], limit_bytes: int, *, scanned: bool
    ) -> Received:
        """Stores ``data``. Raises InvalidRequest when it is too large, BlobsUnavailable, or what ``data`` raises."""
        file_id = f"file-{uuid.uuid4().hex}"
        extension = _EXTENSION.fullmatch(filename)
        blob = key(tenant, file_id + (extension[1] if extension else ".jsonl"))
        scanner = Scanner(self._limits) if scanned else None
        try:
            size = await self._blobs.put(blob, _watched(data, scanner), limit_bytes)
        except BlobTooLarge:
            raise too_large(limit_bytes) from None
        scan, plan = await asyncio.to_thread(scanner.finish) if scanner else (None, None)
        return Received(id=file_id, blob=blob, bytes=size, scan=scan, plan=plan)

    async def file(
        self, received: Received, tenant: str, purpose: str, filename: str, expires_after_s: int | None
    ) -> File:
        """The record of what was received, with its plan stored; the caller adds it, or discards all."""
        scan, plan_blob = (received.scan, None) if purpose == "batch" else (None, None)
        if scan is not None and not scan.error_count and received.plan is not None:
            plan_blob = key(tenant, f"{received.id}.plan")
            plan = received.plan.tobytes()
            await self._blobs.put(plan_blob, _once(plan), len(plan))
        now_s = self._clock()
        if expires_after_s is None:
            batch, other = self._settings.batch_file_expires_after_s, self._settings.file_expires_after_s
            expires_after_s = batch if purpose == "batch" else other
        return File(
            id=received.id,
            tenant=tenant,
            purpose=purpose,
            filename=filename or received.blob.rpartition("/")[2],
            bytes=received.bytes,
            created_s=now_s,
            blob=received.blob,
            expires_s=None if expires_after_s is None else now_s + expires_after_s,
            status="error" if scan is not None and scan.error_count else "processed",
            status_details=details(scan) if scan is not None and scan.error_count else None,
            scan=scan,
            plan_blob=plan_blob,
        )

    async def discard(self, received: Received, tenant: str) -> None:
        await self.delete(received.blob, key(tenant, f"{received.id}.plan"))

    async def delete(self, *blobs: str | None) -> None:
        """Best effort, bounded: a blob that stays is logged, and nothing points to it."""
        for blob in filter(None, blobs):
            try:
                async with asyncio.timeout(DISCARD_S):
                    await self._blobs.delete(blob)
            except (BlobError, TimeoutError) as e:
                log.warning("blob %s is left behind: %s", blob, e)


def details(scan: Scan) -> str:
    first = scan.errors[0]
    where = "" if first.line is None else f"line {first.line}: "
    count = f"{scan.error_count} errors, the first: " if scan.error_count > 1 else ""
    return f"{count}{where}{first.message}"


async def _watched(data: AsyncIterator[bytes], scanner: Scanner | None) -> AsyncIterator[bytes]:
    """Passes on pieces of at least ``SCAN_BYTES``, the last one excepted, each read by the scanner first."""
    pending = bytearray()
    async for piece in data:
        pending += piece
        if len(pending) >= SCAN_BYTES:
            yield await _scanned(bytes(pending), scanner)
            pending.clear()
    yield await _scanned(bytes(pending), scanner)


async def _scanned(piece: bytes, scanner: Scanner | None) -> bytes:
    if scanner is not None:
        await asyncio.to_thread(scanner.feed, piece)
    return piece


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
