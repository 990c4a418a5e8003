"""A batch's life in SQL: every step is a compare-and-set of its row, so that no status ever goes back.

Rows are locked in one order everywhere, chunk before batch before counters; who needs chunks with the batch locked
passes over those that others hold (SKIP LOCKED). So nobody waits in a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchgw.records import Batch, BatchClaim, Chunk, Delivery, File, LineError
from batchgw.store.base import LeaseLost
from batchgw.store.batches import FREED, change_batch, change_held, held, insert_chunks, lease_batch, read_batch
from batchgw.store.files import SqlFiles
from batchgw.store.tables import (
    LEASED,
    QUEUED,
    UNDONE,
    batch_models,
    batches,
    chunks,
    deliveries,
    results,
    row_to_batch,
    to_row,
)

UNDECIDED = batches.c.status.in_(["validating", "in_progress"]) & batches.c.ending.is_(None)
ANSWERED = batches.c.completed + batches.c.failed >= batches.c.total


class SqlLife(SqlFiles):
    async def cancel_batch(self, tenant: str, batch_id: str, now_s: float) -> Batch | None:
        mine = (batches.c.id == batch_id) & (batches.c.tenant == tenant)
        values = {"status": "cancelling", "ending": "cancelled", "cancelling_s": now_s, **FREED}
        async with self.database.write() as connection:
            cancelled = await change_batch(connection, mine & UNDECIDED, values)
            if cancelled is None:
                return await read_batch(connection, tenant, batch_id)
            await _close_queued(connection, batch_id)
        return cancelled

    async def start_batch(
        self, claim: BatchClaim, chunks: Sequence[Chunk], total: int, model: str | None, now_s: float
    ) -> Batch:
        planned = sum(chunk.stop - chunk.start for chunk in chunks)
        if planned != total:
            raise ValueError(f"batch {claim.batch.id}: {planned} lines in its chunks, {total} in all")
        values: dict[str, Any] = {"status": "in_progress", "in_progress_s": now_s, "total": total, "model": model}
        if not chunks:
            values |= {"status": "finalizing", "ending": "completed", "finalizing_s": now_s}
        async with self.database.write() as connection:
            _raise_unless(claim.batch.status == "validating", claim)
            started = await change_held(connection, claim, values | FREED)
            await insert_chunks(connection, started.id, chunks)
        return started

    async def fail_batch(
        self,
        claim: BatchClaim,
        errors: Sequence[LineError],
        now_s: float,
        *,
        total: int = 0,
        deliveries: Sequence[Delivery] = (),
    ) -> Batch:
        values = {"total": total, "failed": total, "errors": tuple(errors), **_over("failed", now_s)}
        async with self.database.write() as connection:
            _raise_unless(claim.batch.status == "validating", claim)
            failed = await change_held(connection, claim, values)
            await _insert_deliveries(connection, deliveries)
        return failed

    async def end_batch(
        self,
        batch_id: str,
        ending: Literal["completed", "expired", "failed"],
        now_s: float,
        errors: Sequence[LineError] = (),
    ) -> Batch | None:
        values: dict[str, Any] = {"ending": ending, **FREED}
        condition = (batches.c.id == batch_id) & UNDECIDED
        match ending:
            case "completed":
                condition &= (batches.c.status == "in_progress") & ANSWERED
                values |= {"status": "finalizing", "finalizing_s": now_s}
            case "expired":
                condition &= batches.c.deadline_s <= now_s
            case "failed":
                values["errors"] = tuple(errors)
        async with self.database.write() as connection:
            ended = await change_batch(connection, condition, values)
            if ended is not None:
                await _close_queued(connection, batch_id)
        return ended

    async def expire_batches(self, now_s: float, limit: int) -> list[str]:
        late = sa.select(batches.c.id).where(batches.c.open, batches.c.deadline_s <= now_s, UNDECIDED)
        async with self.database.read() as connection:
            found = list(await connection.scalars(late.order_by(batches.c.deadline_s).limit(limit)))
        return [batch_id for batch_id in found if await self.end_batch(batch_id, "expired", now_s)]

    async def claim_ending(self, worker: str, now_s: float, lease_s: float) -> BatchClaim | None:
        live = sa.exists().where(chunks.c.batch_id == batches.c.id, LEASED, chunks.c.lease_until_s > now_s)
        async with self.database.write() as connection:
            claim = await lease_batch(connection, batches.c.ending.is_not(None) & ~live, worker, now_s, lease_s)
            if claim is None or await _close_all(connection, claim.batch.id, now_s):
                return claim
            await connection.rollback()
        return None

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
        async with self.database.write() as connection:
            row = (await connection.execute(sa.select(batches).where(held(claim)).with_for_update())).first()
            _raise_unless(row is not None and row.ending is not None, claim)
            assert row is not None
            values = _counted(row_to_batch(row), completed, failed) | _over(row.ending, now_s)
            values |= {"output_file_id": output and output.id, "error_file_id": errors and errors.id}
            finished = await change_held(connection, claim, values)
            for file in filter(None, (output, errors)):
                await self.insert_file(connection, file)
            await _insert_deliveries(connection, deliveries)
            for table in (results, chunks, batch_models):
                await connection.execute(sa.delete(table).where(table.c.batch_id == finished.id))
        return finished


def _raise_unless(valid: bool, claim: BatchClaim) -> None:
    if not valid:
        raise LeaseLost(f"batch {claim.batch.id}: what epoch {claim.epoch} was for is over")


def _over(status: str, now_s: float) -> dict[str, Any]:
    """A terminal row; the client's headers (they hold tokens) go with the work they were for."""
    return {"status": status, "ending": status, f"{status}_s": now_s, "open": False, "headers": None, **FREED}


def _counted(batch: Batch, completed: int, failed: int) -> dict[str, Any]:
    started = batch.in_progress_s is not None
    if started and completed + failed != batch.total:
        raise ValueError(f"batch {batch.id}: {completed} completed and {failed} failed of {batch.total} lines")
    return {"completed": completed, "failed": failed, "total": completed + failed}


async def _insert_deliveries(connection: AsyncConnection, added: Sequence[Delivery]) -> None:
    if added:
        await connection.execute(sa.insert(deliveries), [to_row(delivery) for delivery in added])


async def _close_queued(connection: AsyncConnection, batch_id: str) -> None:
    """Those just being claimed stay: their worker hears at its next heartbeat that the batch ends."""
    of_batch = chunks.c.batch_id == batch_id
    queued = sa.select(chunks.c.number).where(of_batch, QUEUED).with_for_update(skip_locked=True)
    await connection.execute(sa.update(chunks).where(of_batch, chunks.c.number.in_(queued)).values(state="done"))


async def _close_all(connection: AsyncConnection, batch_id: str, now_s: float) -> bool:
    """Closes what is open, so that late workers are fenced off; False when one of them writes this very moment."""
    undone = (chunks.c.batch_id == batch_id) & UNDONE
    count = await connection.scalar(sa.select(sa.func.count()).select_from(chunks).where(undone))
    locked = sa.select(chunks.c.state, chunks.c.lease_until_s).where(undone).with_for_update(skip_locked=True)
    rows = list(await connection.execute(locked))
    if len(rows) != count or any(row.state == "leased" and row.lease_until_s > now_s for row in rows):
        return False
    await connection.execute(sa.update(chunks).where(undone).values(state="done"))
    return True
