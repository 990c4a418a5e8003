"""The end of a batch: its results, in the order of its lines, become an output and an error file.

File ids and contents follow from the batch alone, so that a finalizer killed at any instant is followed by another that
writes the same files again. Results do not change once the end is claimed.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

import msgspec
import numpy as np

from batchgw import blobs as keys
from batchgw.blobs import BlobError, BlobMissing, Blobs
from batchgw.client import result as results
from batchgw.lines import Plan
from batchgw.records import Batch, BatchClaim, Delivery, Ending, File, Result
from batchgw.store.base import LeaseLost, Store
from batchgw.worker.inputs import Inputs
from batchgw.worker.leases import Leases
from batchgw.worker.metrics import Metrics

log = logging.getLogger(__name__)

WRITE_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 40
WRITE_LIMIT_S = 900.0
IDS_AT_ONCE = 500
AGAIN_S, MAX_AGAIN_S = 1.0, 60.0
OUTPUT_EXPIRES_S = 90 * 86400.0

LINE_ERRORS: dict[Ending, results.Error] = {
    "completed": results.FAILED,
    "failed": results.FAILED,
    "expired": results.EXPIRED,
    "cancelled": results.CANCELLED,
}
"""What a line without result is told."""

Routing = Literal["openai", "llm-d"]
"""Where an HTTP answer that is no 2xx goes: to the error file, or to the output file."""


class FinalizerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """``webhooks`` are the names of those to be told of each end."""

    routing: Routing = "openai"
    output_expires_s: float = OUTPUT_EXPIRES_S
    webhooks: tuple[str, ...] = ()

    def check(self) -> None:
        if self.output_expires_s <= 0:
            raise ValueError(f"outputExpiresS must be above 0, not {self.output_expires_s}")


class Finalizer:
    """``step`` takes one batch to its terminal status; it is called again and again."""

    def __init__(
        self, store: Store, blobs: Blobs, inputs: Inputs, leases: Leases, metrics: Metrics, *,
        settings: FinalizerSettings | None = None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._blobs, self._inputs, self._leases, self._metrics = store, blobs, inputs, leases, metrics
        self._settings, self._clock = settings or FinalizerSettings(), clock

    async def step(self) -> bool:
        """True when there was a batch to end. Raises StoreUnavailable."""
        claim = await self._store.claim_ending(self._leases.worker, self._clock(), self._leases.lease_s)
        if claim is None:
            return False
        if claim.attempts:
            self._metrics.recoveries.labels(claim.batch.status, "finalized").inc()
        # A finalizer that lost its lease writes the same files, and its last word is refused: nothing to stop.
        self._leases.hold(claim, lost=lambda: None)
        try:
            await self.finish(claim)
        except LeaseLost as e:
            log.warning("%s", e)
        except (BlobError, TimeoutError) as e:
            again_s = min(MAX_AGAIN_S, AGAIN_S * 2.0 ** min(claim.attempts, 10))
            log.warning("batch %s: its files cannot be written yet: %s", claim.batch.id, e)
            await self._store.release_batch(claim, self._clock() + again_s)
        finally:
            self._leases.let_go(claim)
        return True

    async def finish(self, claim: BatchClaim) -> Batch:
        """Raises LeaseLost, StoreUnavailable, BlobError, TimeoutError."""
        batch, plan = claim.batch, None
        total = await self._total(batch)
        if batch.completed + batch.failed < total:
            plan = await self._by_line(batch)
        tally = _Tally(self._settings.routing)
        output = await self._file(batch, "output", _joined(tally.outputs(self._store.results(batch.id))))
        failing = tally.errors(self._store.results(batch.id))
        errors = await self._file(batch, "error", _joined(self._with_missing(batch, total, plan, failing)))
        now_s = self._clock()
        finished = await self._store.finish_batch(
            claim, completed=tally.completed, failed=total - tally.completed, now_s=now_s, output=output, errors=errors,
            deliveries=deliveries(batch, self._settings.webhooks, str(batch.ending), now_s),
        )  # fmt: skip
        self._metrics.ended(finished, now_s)
        return finished

    async def _total(self, batch: Batch) -> int:
        """Lines to account for: of a batch that never started too, if its file was in order."""
        if batch.in_progress_s is not None:
            return batch.total
        try:
            scan = (await self._inputs.file(batch)).scan
        except BlobMissing:
            return batch.total
        return scan.lines if scan is not None and not scan.error_count else batch.total

    async def _by_line(self, batch: Batch) -> Plan | None:
        """The plan in the order of lines; None when the input file is gone, and its custom ids with it."""
        try:
            plan = await self._inputs.plan(batch)
        except BlobMissing:
            return None
        return plan[np.argsort(plan["line"])]

    async def _with_missing(
        self, batch: Batch, total: int, plan: Plan | None, failing: AsyncIterator[tuple[int, bytes | None]]
    ) -> AsyncIterator[bytes]:
        """Failed lines, and an error line for each that has no result, in order. ``failing`` gives every result's line,
        with its bytes where they are for the error file."""
        expected, missing = 0, list[int]()
        async for line, data in failing:
            missing += range(expected, line)
            expected = line + 1
            if data is not None or len(missing) >= IDS_AT_ONCE:
                for made in await self._missing(batch, plan, missing):
                    yield made
                missing = []
            if data is not None:
                yield data
        missing += range(expected, total)
        for start in range(0, len(missing), IDS_AT_ONCE):
            for made in await self._missing(batch, plan, missing[start : start + IDS_AT_ONCE]):
                yield made

    async def _missing(self, batch: Batch, plan: Plan | None, lines: Sequence[int]) -> list[bytes]:
        error = LINE_ERRORS[batch.ending or "failed"]
        ids = [""] * len(lines)
        if plan is not None and lines:
            try:
                ids = await self._inputs.custom_ids(batch, plan[list(lines)])
            except (BlobMissing, msgspec.DecodeError) as e:
                log.error("batch %s: lines without their custom ids: %s", batch.id, e)
        return [results.unanswered(batch.id, line, id, error).output for line, id in zip(lines, ids, strict=True)]

    async def _file(self, batch: Batch, kind: Literal["output", "error"], data: AsyncIterator[bytes]) -> File | None:
        """None when there is nothing to write."""
        id = f"file-{uuid.uuid5(uuid.NAMESPACE_OID, f'{batch.id} {kind}').hex}"
        key = keys.key(batch.tenant, f"{id}.jsonl")
        async with asyncio.timeout(WRITE_LIMIT_S):
            first = await anext(data, b"")
            if not first:
                return None
            size = await self._blobs.put(key, _before(first, data), MAX_FILE_BYTES)
        now_s = self._clock()
        return File(
            id=id,
            tenant=batch.tenant,
            purpose="batch_output",
            filename=f"batch_{kind}_{batch.id}.jsonl",
            bytes=size,
            created_s=now_s,
            expires_s=now_s + (batch.output_expires_after_s or self._settings.output_expires_s),
            blob=key,
        )


class _Tally:
    """Tells results for the output file from those for the error file, and counts."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self.completed = 0

    async def outputs(self, all_results: AsyncIterator[Result]) -> AsyncIterator[bytes]:
        async for result in all_results:
            self.completed += result.ok
            if self._to_output(result):
                yield result.output

    async def errors(self, all_results: AsyncIterator[Result]) -> AsyncIterator[tuple[int, bytes | None]]:
        async for result in all_results:
            yield result.line, None if self._to_output(result) else result.output

    def _to_output(self, result: Result) -> bool:
        return result.ok or (self._routing == "llm-d" and result.output.endswith(results.NULL_ERROR_END))


def deliveries(batch: Batch, webhooks: Sequence[str], ending: str, now_s: float) -> list[Delivery]:
    """One event for each webhook; its id follows from both, so that a repeated one is recognised."""
    return [
        Delivery(
            id=f"evt_{uuid.uuid5(uuid.NAMESPACE_OID, f'{batch.id} {ending} {webhook}').hex}",
            webhook=webhook,
            batch_id=batch.id,
            tenant=batch.tenant,
            event=f"batch.{ending}",
            created_s=now_s,
            due_s=now_s,
        )
        for webhook in webhooks
    ]


async def _joined(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines in pieces of about WRITE_BYTES."""
    piece = bytearray()
    async for line in lines:
        piece += line
        if len(piece) >= WRITE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


async def _before(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
