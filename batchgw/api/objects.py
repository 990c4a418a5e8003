"""The objects on the wire, as OpenAI names their fields, made from our records. Times are whole unix seconds."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec
from fastapi import Response

from batchgw.records import Batch, BatchStatus, File, FileStatus, LineError, Part, Upload, UploadStatus

T = TypeVar("T")


class FileObject(msgspec.Struct, frozen=True):
    id: str
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: FileStatus
    status_details: str | msgspec.UnsetType = msgspec.UNSET
    object: Literal["file"] = "file"


class DeletedFile(msgspec.Struct, frozen=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class UploadObject(msgspec.Struct, frozen=True):
    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadStatus
    file: FileObject | None
    object: Literal["upload"] = "upload"


class PartObject(msgspec.Struct, frozen=True):
    id: str
    created_at: int
    upload_id: str
    object: Literal["upload.part"] = "upload.part"


class RequestCounts(msgspec.Struct, frozen=True):
    total: int
    completed: int
    failed: int


class BatchErrors(msgspec.Struct, frozen=True):
    data: tuple[LineError, ...]
    object: Literal["list"] = "list"


class InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class BatchUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    created_at: int
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    cancelled_at: int | None
    cancelling_at: int | None
    completed_at: int | None
    expired_at: int | None
    expires_at: int | None
    failed_at: int | None
    finalizing_at: int | None
    in_progress_at: int | None
    model: str | msgspec.UnsetType = msgspec.UNSET
    request_counts: RequestCounts
    errors: BatchErrors | None
    usage: BatchUsage | None


class ListObject(msgspec.Struct, Generic[T], frozen=True):
    data: tuple[T, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


def of_file(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_s),
        expires_at=_seconds(file.expires_s),
        filename=file.filename,
        purpose=file.purpose,
        status=file.status,
        status_details=file.status_details or msgspec.UNSET,
    )


def of_upload(upload: Upload, file: File | None = None) -> UploadObject:
    return UploadObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=int(upload.created_s),
        expires_at=int(upload.expires_s),
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        file=of_file(file) if file else None,
    )


def of_part(part: Part) -> PartObject:
    return PartObject(part.id, int(part.created_s), part.upload_id)


def of_batch(batch: Batch) -> BatchObject:
    usage = batch.usage
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        metadata=batch.metadata,
        created_at=int(batch.created_s),
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        cancelled_at=_seconds(batch.cancelled_s),
        cancelling_at=_seconds(batch.cancelling_s),
        completed_at=_seconds(batch.completed_s),
        expired_at=_seconds(batch.expired_s),
        expires_at=_seconds(batch.deadline_s),
        failed_at=_seconds(batch.failed_s),
        finalizing_at=_seconds(batch.finalizing_s),
        in_progress_at=_seconds(batch.in_progress_s),
        model=batch.model or msgspec.UNSET,
        request_counts=RequestCounts(batch.total, batch.completed, batch.failed),
        errors=BatchErrors(batch.errors) if batch.errors else None,
        usage=BatchUsage(
            usage.input_tokens,
            InputDetails(usage.cached_tokens),
            usage.output_tokens,
            OutputDetails(usage.reasoning_tokens),
            usage.input_tokens + usage.output_tokens,
        )
        if batch.in_progress_s is not None
        else None,
    )


def reply(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _seconds(time_s: float | None) -> int | None:
    return None if time_s is None else int(time_s)
