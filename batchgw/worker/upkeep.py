"""What keeps the store in order: batches are planned, expire and end, files are collected, webhooks are told.

Each chore does a bounded piece and is safe to run in any number of processes: leases and compare-and-swap decide whose
work counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from batchgw.blobs import BlobError, BlobMissing, Blobs
from batchgw.lines import Plan
from batchgw.records import BatchClaim, Chunk, File, LineError
from batchgw.store.base import FileInUse, LeaseLost, Store, StoreUnavailable
from batchgw.worker.finalize import Finalizer, deliveries
from batchgw.worker.inputs import Inputs
from batchgw.worker.leases import Leases
from batchgw.worker.metrics import Metrics, size_bucket
from batchgw.worker.webhooks import Teller

log = logging.getLogger(__name__)

CHUNK_LINES = 50
CUT_SLACK = 12
"""A cut moves by up to so many lines to where the prefix changes."""

AT_ONCE = 100
"""Objects one round of a chore handles."""

BLOBS_AGAIN_S = 5.0


Chore = Callable[[], Coroutine[Any, Any, bool]]


class UpkeepSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """``look_s`` between looks at batches, ``collect_s`` between collections; batches are forgotten ``keep_batches_s``
    after their end. ``webhooks``: names of those told of a batch that fails its validation."""

    look_s: float = 0.5
    collect_s: float = 600.0
    keep_batches_s: float = 90 * 86400.0
    webhooks: tuple[str, ...] = ()

    def check(self) -> None:
        if min(self.look_s, self.collect_s, self.keep_batches_s) <= 0:
            raise ValueError("lookS, collectS and keepBatchesS must be above 0")


class Upkeep:
    def __init__(
        self, store: Store, blobs: Blobs, inputs: Inputs, leases: Leases, finalizer: Finalizer, metrics: Metrics, *,
        teller: Teller | None = None, settings: UpkeepSettings | None = None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._blobs, self._inputs, self._leases = store, blobs, inputs, leases
        self._finalizer, self._metrics, self._teller = finalizer, metrics, teller
        self._settings, self._clock = settings or UpkeepSettings(), clock
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until ``stop``; cancelled in the middle of a chore, it leaves what it held to run out."""
        look_s, collect_s = self._settings.look_s, self._settings.collect_s
        chores = [(self.plan, look_s), (self.expire, look_s), (self._finalizer.step, look_s), (self.collect, collect_s)]
        if self._teller is not None:
            chores.append((self._teller.step, look_s))
        async with asyncio.TaskGroup() as group:
            for chore, every_s in chores:
                group.create_task(self._again(chore, every_s))

    def stop(self) -> None:
        """Each chore ends what it has begun."""
        self._stop.set()

    async def _again(self, chore: Chore, every_s: float) -> None:
        """A chore that did something is asked again at once."""
        while not self._stop.is_set():
            did, failed, began_s = False, False, self._clock()
            try:
                did = await chore()
            except (StoreUnavailable, BlobError, TimeoutError) as e:
                failed = True
                log.warning("%s: %s: %s", chore.__qualname__, type(e).__name__, e)
            self._metrics.chore(chore.__name__, self._clock() - began_s, failed=failed)
            if not did:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(every_s):
                        await self._stop.wait()

    async def plan(self) -> bool:
        """Starts (or fails) one validating batch. Raises StoreUnavailable."""
        now_s = self._clock()
        claim = await self._store.claim_validating(self._leases.worker, now_s, self._leases.lease_s)
        if claim is None:
            return False
        if claim.attempts:
            self._metrics.recoveries.labels("validating", "planned").inc()
        self._leases.hold(claim, lost=lambda: None)  # the last word of one that lost it is refused
        try:
            if claim.batch.deadline_s <= now_s:
                await self._store.end_batch(claim.batch.id, "expired", now_s)
                await self._store.release_batch(claim)
            else:
                await self._start(claim)
        except LeaseLost as e:
            log.warning("%s", e)
        except (BlobError, TimeoutError) as e:
            log.warning("batch %s cannot be planned yet: %s", claim.batch.id, e)
            await self._store.release_batch(claim, now_s + BLOBS_AGAIN_S)
        finally:
            self._leases.let_go(claim)
        return True

    async def _start(self, claim: BatchClaim) -> None:
        batch, began_s = claim.batch, self._clock()
        try:
            file = await self._inputs.file(batch)
            plan = await self._inputs.plan(batch)
        except BlobMissing:
            await self._fail(claim, [LineError("file_not_found", "The input file is gone.", "input_file_id")], 0)
            return
        errors, lines = faults(file, batch.endpoint), file.scan.lines if file.scan else 0
        if not errors and len(plan) != lines:
            errors = [LineError("file_unreadable", "The input file has no plan.", "input_file_id")]
        if errors:
            await self._fail(claim, errors, lines)
            return
        models = file.scan.models if file.scan else ()
        model = models[0] if len(models) == 1 else None
        await self._store.start_batch(claim, cut(batch.id, plan, models), lines, model, self._clock())
        self._metrics.plan_s.labels(size_bucket(lines)).observe(self._clock() - began_s)
        self._metrics.queue_wait_s.observe(self._clock() - batch.created_s)

    async def _fail(self, claim: BatchClaim, errors: Sequence[LineError], lines: int) -> None:
        now_s = self._clock()
        told = deliveries(claim.batch, self._settings.webhooks, "failed", now_s)
        failed = await self._store.fail_batch(claim, errors, now_s, total=lines, deliveries=told)
        self._metrics.ended(failed, now_s)

    async def expire(self) -> bool:
        """Decides the end of batches past their deadline. Raises StoreUnavailable."""
        return bool(await self._store.expire_batches(self._clock(), AT_ONCE))

    async def collect(self) -> bool:
        """One round over expired files, stale uploads and old batches. Raises StoreUnavailable, BlobError."""
        now_s = self._clock()
        files = await self._store.expired_files(now_s, AT_ONCE)
        removed = [await self._remove(file) for file in files]
        uploads = await self._store.stale_uploads(now_s, AT_ONCE)
        for upload in uploads:
            await self._store.end_upload(upload.tenant, upload.id, "expired")
            for part in await self._store.parts(upload.id):
                await self._blobs.delete(part.blob)
            await self._store.remove_parts(upload.id)
        batches = await self._store.remove_batches(now_s - self._settings.keep_batches_s, AT_ONCE)
        for kind, count in (("file", sum(removed)), ("upload", len(uploads)), ("batch", batches)):
            self._metrics.collected.labels(kind).inc(count)
        return any(removed) or bool(uploads) or batches >= AT_ONCE

    async def _remove(self, file: File) -> bool:
        """The bytes first: a row without bytes is found again, bytes without a row never."""
        for blob in filter(None, (file.blob, file.plan_blob)):
            await self._blobs.delete(blob)
        try:
            return await self._store.remove_file(file.tenant, file.id) is not None
        except FileInUse:
            return False


def faults(file: File, endpoint: str) -> list[LineError]:
    """Why a batch over this file cannot start; empty when it can."""
    if file.scan is None:
        return [LineError("file_unreadable", "The input file was not uploaded with purpose 'batch'.", "input_file_id")]
    if file.scan.error_count:
        return list(file.scan.errors)
    if wrong := [url for url in file.scan.urls if url != endpoint]:
        message = f"The lines' url is {wrong[0]} but the batch's endpoint is {endpoint}; they must be the same."
        return [LineError("url_mismatch", message, "url", 1)]
    return []


def cut(batch_id: str, plan: Plan, models: Sequence[str]) -> list[Chunk]:
    """Chunks of about CHUNK_LINES lines of one model, nearly equal in size, cut where the prefix changes if near."""
    chunks: list[Chunk] = []
    edges = [0, *(np.flatnonzero(np.diff(plan["model"])) + 1).tolist(), len(plan)]
    for first, last in pairwise(edges):
        for start, stop in _pieces(plan["prefix"], first, last):
            model, prefix = models[int(plan["model"][start])], int(plan["prefix"][start])
            chunks.append(
                Chunk(batch_id=batch_id, number=len(chunks), model=model, start=start, stop=stop, prefix=prefix)
            )
    return chunks


def _pieces(prefixes: np.ndarray, first: int, last: int) -> list[tuple[int, int]]:
    count = max(1, round((last - first) / CHUNK_LINES)) if last > first else 0
    cuts = [first + (last - first) * i // count for i in range(1, count)]
    changes = first + 1 + np.flatnonzero(prefixes[first + 1 : last] != prefixes[first : last - 1])
    if len(changes):
        nearest = [int(changes[np.argmin(np.abs(changes - at))]) for at in cuts]
        cuts = [near if abs(near - at) <= CUT_SLACK else at for near, at in zip(nearest, cuts, strict=True)]
    edges = [first, *cuts, last]
    return list(pairwise(edges)) if count else []
