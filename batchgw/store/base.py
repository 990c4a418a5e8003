"""What the gateway asks of its database.

Rules every store keeps: a status only moves forward, and what is terminal stays; each verb is one transaction, or none
of it happened; each is bounded in time. Any verb raises ``StoreUnavailable`` when the database cannot be reached, was
lost on the way or did not answer in time: what was asked may have happened or not, and every verb may be asked again.
A lease carries an epoch that grows with each owner; who writes with an old one gets ``LeaseLost`` and changes nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Generic, Literal, Protocol, TypeVar

import msgspec

from batchgw.records import (
    Alive,
    ApiKey,
    Batch,
    BatchClaim,
    Chunk,
    Claim,
    Delivery,
    File,
    LineError,
    Part,
    Result,
    Upload,
    Waiting,
)

T = TypeVar("T")


class StoreError(Exception):
    """Base of what a store raises."""


class StoreUnavailable(StoreError):
    """The database could not be reached or did not answer in time; asking again later is right."""


class LeaseLost(StoreError):
    """The lease ran out and is another's, or what it was for is over; nothing was written."""


class UnknownCursor(StoreError):
    """A page was asked for after an object that this tenant does not have."""


class FileInUse(StoreError):
    """The file is the input of a batch that is not over; ``batch_id`` says which."""

    def __init__(self, file_id: str, batch_id: str) -> None:
        super().__init__(f"file {file_id} is the input of batch {batch_id}, which is not over")
        self.batch_id = batch_id


class Page(msgspec.Struct, frozen=True):
    """``limit`` objects after an object's id, or after that many objects where ``after`` is a number."""

    after: str | int | None = None
    limit: int = 20
    descending: bool = True


class Listed(msgspec.Struct, Generic[T], frozen=True):
    """One page, in order of creation (equal times in order of id)."""

    items: tuple[T, ...]
    has_more: bool


class Files(Protocol):
    """Files and uploads. ``tenant`` is part of every question: a foreign id is as unknown as a made up one."""

    async def add_file(self, file: File) -> None: ...

    async def file(self, tenant: str, file_id: str) -> File | None: ...

    async def files(self, tenant: str, purpose: str | None, page: Page) -> Listed[File]:
        """Raises UnknownCursor."""

    async def remove_file(self, tenant: str, file_id: str) -> File | None:
        """The file as it was, for its blobs to be deleted; None when there was none. Raises FileInUse."""

    async def expired_files(self, now_s: float, limit: int) -> list[File]:
        """Files past ``expires_s`` that no unfinished batch reads, oldest first; they stay until removed."""

    async def known_ids(self, ids: Collection[str]) -> set[str]:
        """Those of these ids that are a file's or a part's, of any tenant."""

    async def stored_bytes(self, tenant: str) -> int:
        """Of the tenant's files."""

    async def add_upload(self, upload: Upload) -> None: ...

    async def upload(self, tenant: str, upload_id: str) -> Upload | None: ...

    async def add_part(self, part: Part) -> bool:
        """False when the upload is not pending, or past its expiry at the part's ``created_s``."""

    async def parts(self, upload_id: str) -> list[Part]:
        """In order of creation."""

    async def end_upload(
        self,
        tenant: str,
        upload_id: str,
        status: Literal["completed", "cancelled", "expired"],
        file: File | None = None,
    ) -> Upload | None:
        """From pending to ``status``, and ``file`` added, together; None when it was not pending (or is unknown)."""

    async def stale_uploads(self, now_s: float, limit: int) -> list[Upload]:
        """Uploads to clean up: those past their expiry (pending ones are ended first), and ended ones with parts."""

    async def remove_parts(self, upload_id: str) -> None:
        """Forgets the parts of an upload, and the upload once it ended; the caller deletes their blobs first."""


class Batches(Protocol):
    """Batches from creation to their terminal status.

    validating -> in_progress -> finalizing -> completed;  validating -> failed;
    validating | in_progress -> cancelling -> cancelled;  with an ``ending`` decided: -> expired | failed.
    """

    async def add_batch(self, batch: Batch, chunks: Sequence[Chunk] = ()) -> Batch:
        """The batch as stored: the older one (another ``id``) where tenant and idempotency key are taken."""

    async def batch(self, tenant: str | None, batch_id: str) -> Batch | None:
        """``tenant`` None is for the gateway's own work: any tenant's."""

    async def batches(self, tenant: str, page: Page) -> Listed[Batch]:
        """Raises UnknownCursor."""

    async def open_batches(self, tenant: str) -> int:
        """Batches that are not terminal."""

    async def queued_lines(self, tenant: str) -> int:
        """Lines without result in the tenant's batches that are not terminal."""

    async def cancel_batch(self, tenant: str, batch_id: str, now_s: float) -> Batch | None:
        """The batch afterwards; None when unknown.

        validating | in_progress without an ending becomes cancelling, and its queued chunks are closed at once. Any
        other is returned as it is: the caller sees from ``status`` whether it was too late.
        """

    async def claim_validating(self, worker: str, now_s: float, lease_s: float) -> BatchClaim | None:
        """The validating batch with the earliest deadline that nobody holds."""

    async def start_batch(
        self, claim: BatchClaim, chunks: Sequence[Chunk], total: int, model: str | None, now_s: float
    ) -> Batch:
        """validating -> in_progress with its chunks; without chunks straight on to finalizing. Raises LeaseLost."""

    async def fail_batch(
        self,
        claim: BatchClaim,
        errors: Sequence[LineError],
        now_s: float,
        *,
        total: int = 0,
        deliveries: Sequence[Delivery] = (),
    ) -> Batch:
        """validating -> failed, with what is wrong; all of ``total`` lines count as failed. Raises LeaseLost."""

    async def end_batch(
        self,
        batch_id: str,
        ending: Literal["completed", "expired", "failed"],
        now_s: float,
        errors: Sequence[LineError] = (),
    ) -> Batch | None:
        """Decides the end; None when it does not apply (another end is decided, or the batch is unknown).

        completed: from in_progress when no line is left (the last ``add_results`` does this itself); expired: when the
        deadline passed; failed: at any time before an end is decided, with ``errors``. Queued chunks are closed.
        """

    async def expire_batches(self, now_s: float, limit: int) -> list[str]:
        """``end_batch(..., "expired")`` for up to ``limit`` batches past their deadline; their ids."""

    async def claim_ending(self, worker: str, now_s: float, lease_s: float) -> BatchClaim | None:
        """A batch whose end is decided, whose chunks nobody works on any more and that nobody holds.

        From here on ``add_results`` for it raises LeaseLost: what ``results`` gives does not change any more.
        """

    async def finish_batch(
        self,
        claim: BatchClaim,
        *,
        completed: int,
        failed: int,
        now_s: float,
        output: File | None = None,
        errors: File | None = None,
        deliveries: Sequence[Delivery] = (),
    ) -> Batch:
        """To the terminal status ``ending`` names: counts, files, deliveries in, results, chunks, headers out, at once.

        Raises LeaseLost, and ValueError unless completed + failed is the total (which it sets for a batch that never
        started).
        """

    async def release_batch(self, claim: BatchClaim, not_before_s: float = 0.0) -> None:
        """Hands a batch row back, to be claimed from ``not_before_s`` on; does nothing when the lease is lost."""

    async def remove_batches(self, ended_before_s: float, limit: int) -> int:
        """Deletes terminal batches that ended before then; how many. Their files live by their own expiry."""


class Work(Protocol):
    """Chunks and results: who answers which lines."""

    async def waiting(self, now_s: float) -> list[Waiting]:
        """One row per (batch, model) of running batches that has lines without result."""

    async def claim_chunk(self, batch_id: str, model: str, worker: str, now_s: float, lease_s: float) -> Claim | None:
        """The first chunk that is queued and due, or whose lease ran out; None when there is none just now."""

    async def heartbeat(self, worker: str, held: Collection[Claim | BatchClaim], now_s: float, lease_s: float) -> Alive:
        """Renews what ``worker`` holds and still owns; leases that it does not name are left to run out."""

    async def add_results(self, claim: Claim, results: Sequence[Result], now_s: float) -> int:
        """Counts each line once: how many of ``results`` were new. Raises LeaseLost.

        The chunk is closed when each of its lines has a result, and the batch goes on to finalizing with its last one.
        A batch that is being cancelled or expires still takes what its workers had answered.
        """

    async def release_chunk(self, claim: Claim, not_before_s: float = 0.0) -> None:
        """Hands a chunk back, to be claimed from ``not_before_s`` on; does nothing when the lease is lost."""

    def results(self, batch_id: str) -> AsyncIterator[Result]:
        """All results in order of line, read a page at a time."""


class Deliveries(Protocol):
    """Webhook events that wait to be told; written together with the status they tell of."""

    async def claim_delivery(self, now_s: float, lease_s: float) -> Delivery | None:
        """The one due first, with ``attempts`` one more; it is due again after ``lease_s`` unless ended."""

    async def retry_delivery(self, delivery_id: str, due_s: float) -> None: ...

    async def end_delivery(self, delivery_id: str) -> None:
        """Delivered, or given up."""


class ApiKeys(Protocol):
    async def add_api_key(self, key: ApiKey) -> None: ...

    async def api_key(self, sha256: str) -> ApiKey | None:
        """None when unknown or revoked."""

    async def api_keys(self, tenant: str | None = None) -> list[ApiKey]:
        """Revoked ones too, in order of creation."""

    async def revoke_api_key(self, sha256: str, now_s: float) -> bool:
        """False when unknown or revoked before."""


class Store(Files, Batches, Work, Deliveries, ApiKeys, Protocol):
    """Everything; ``batchgw.store.open_store(url)`` opens one."""

    async def ping(self) -> None:
        """Raises StoreUnavailable: for readiness."""
