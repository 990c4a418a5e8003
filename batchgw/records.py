"""The words the whole gateway shares: frozen records, no behaviour beyond what follows from their own fields.

Times are unix seconds, sizes bytes, ``line`` counts from 0 except in ``LineError``, where it is the number a person
sees in an editor.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FileStatus = Literal["uploaded", "processed", "error"]
UploadStatus = Literal["pending", "completed", "cancelled", "expired"]
BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
Ending = Literal["completed", "failed", "expired", "cancelled"]
ChunkState = Literal["queued", "leased", "done"]

TERMINAL: frozenset[BatchStatus] = frozenset({"completed", "failed", "expired", "cancelled"})
"""A batch that is in one of these never changes again."""


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with one line (counted from 1), or with the whole file where ``line`` is None; OpenAI's shape."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Scan(msgspec.Struct, frozen=True):
    """What reading an input file once found; ``errors`` are the first 100 of ``error_count``."""

    lines: int
    models: tuple[str, ...]
    urls: tuple[str, ...]
    errors: tuple[LineError, ...] = ()
    error_count: int = 0
    prompt_bytes: int = 0


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One stored file; ``blob`` and ``plan_blob`` are keys of the blob store, the latter None without a plan."""

    id: str
    tenant: str
    purpose: str
    filename: str
    bytes: int
    created_s: float
    blob: str
    expires_s: float | None = None
    status: FileStatus = "processed"
    status_details: str | None = None
    scan: Scan | None = None
    plan_blob: str | None = None


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A file that arrives in parts; ``file_id`` is set when it is completed."""

    id: str
    tenant: str
    purpose: str
    filename: str
    bytes: int
    mime_type: str
    created_s: float
    expires_s: float
    status: UploadStatus = "pending"
    file_id: str | None = None


class Part(msgspec.Struct, frozen=True):
    id: str
    upload_id: str
    created_s: float
    bytes: int
    blob: str


class Usage(msgspec.Struct, frozen=True):
    """Tokens; cached ones are part of the input, reasoning ones part of the output."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch.

    ``ending`` is the end that is decided while files are still being written; a batch that expires shows its old
    ``status`` until then. ``headers`` are the client's pass-through headers, encrypted; ``trace`` a W3C traceparent.
    """

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_s: float
    deadline_s: float
    status: BatchStatus = "validating"
    ending: Ending | None = None
    metadata: dict[str, str] | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = Usage()
    model: str | None = None
    errors: tuple[LineError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_expires_after_s: int | None = None
    in_progress_s: float | None = None
    finalizing_s: float | None = None
    completed_s: float | None = None
    failed_s: float | None = None
    expired_s: float | None = None
    cancelling_s: float | None = None
    cancelled_s: float | None = None
    headers: bytes | None = None
    trace: str | None = None
    idempotency_key: str | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Lines ``start`` to ``stop`` of a batch's plan, all for one model; the unit of work that is leased.

    ``prefix`` is the prefix hash of its first line (unsigned, 64 bits), ``done_lines`` how many of its lines have a
    result, ``attempts`` how many leases of it ran out: a chunk handed back by its worker does not count.
    """

    batch_id: str
    number: int
    model: str
    start: int
    stop: int
    prefix: int = 0
    state: ChunkState = "queued"
    worker: str | None = None
    epoch: int = 0
    lease_until_s: float = 0.0
    attempts: int = 0
    not_before_s: float = 0.0
    done_lines: int = 0


class Lease(msgspec.Struct, frozen=True):
    """What a worker holds: a chunk, or with ``number`` None the batch row itself (to plan it or to write its files)."""

    batch_id: str
    number: int | None
    epoch: int


class Claim(msgspec.Struct, frozen=True):
    """A leased chunk of ``batch``; ``done`` are the lines (of the input file) that have a result already."""

    chunk: Chunk
    batch: Batch
    epoch: int
    done: frozenset[int] = frozenset()

    @property
    def lease(self) -> Lease:
        return Lease(self.chunk.batch_id, self.chunk.number, self.epoch)


class BatchClaim(msgspec.Struct, frozen=True):
    """A leased batch row; ``attempts`` is how many leases of it ran out before, in this phase."""

    batch: Batch
    epoch: int
    attempts: int = 0

    @property
    def lease(self) -> Lease:
        return Lease(self.batch.id, None, self.epoch)


class Alive(msgspec.Struct, frozen=True):
    """Answer to a heartbeat: leases that are somebody else's now, and held batches that are ending or over."""

    lost: frozenset[Lease] = frozenset()
    ended: frozenset[str] = frozenset()


class Result(msgspec.Struct, frozen=True):
    """One answered line: ``output`` is the whole JSONL line with its newline, for the output file or the error file."""

    line: int
    ok: bool
    output: bytes
    usage: Usage = Usage()


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Work of one (batch, model) that runs: lines without result, by whether they can be claimed now.

    ``queued_lines`` include those whose lease ran out and leave out those that wait for their ``not_before_s``;
    ``next_prefix`` is the prefix of the chunk that a claim gets next.
    """

    batch_id: str
    tenant: str
    model: str
    deadline_s: float
    created_s: float
    queued_lines: int
    leased_lines: int
    done_lines: int
    started_s: float | None
    next_prefix: int


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One event to tell one configured webhook; ``id`` stays the same over attempts (Standard Webhooks' webhook-id)."""

    id: str
    webhook: str
    batch_id: str
    tenant: str
    event: str
    created_s: float
    due_s: float
    attempts: int = 0


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """``sha256`` is the hex digest of the key; the key itself is nowhere."""

    sha256: str
    tenant: str
    name: str
    created_s: float
    revoked_s: float | None = None
