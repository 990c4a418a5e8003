"""Batches in SQL: creation, reading, quotas, and the leases on a batch row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchgw.records import Batch, BatchClaim, Chunk
from batchgw.store.base import LeaseLost, Listed, Page
from batchgw.store.database import OnDatabase
from batchgw.store.pages import rows_of_page
from batchgw.store.tables import batch_models, batch_to_row, batches, chunks, row_to_batch, to_row

FREED: dict[str, Any] = {"worker": None, "epoch": batches.c.epoch + 1, "lease_until_s": 0.0, "attempts": 0}
"""A batch row that enters its next phase: whoever held it does no more."""
READ = sa.select(batches).where(batches.c.id == sa.bindparam("wanted"))
READ_OF = READ.where(batches.c.tenant == sa.bindparam("of_tenant"))
ENDED_S = sa.func.coalesce(batches.c.completed_s, batches.c.failed_s, batches.c.expired_s, batches.c.cancelled_s)


class SqlBatches(OnDatabase):
    async def add_batch(self, batch: Batch, chunks: Sequence[Chunk] = ()) -> Batch:
        added = self.database.insert(batches).values(batch_to_row(batch)).on_conflict_do_nothing()
        same_key = (batches.c.tenant == batch.tenant) & (batches.c.idempotency_key == batch.idempotency_key)
        older = sa.select(batches).where(same_key | (batches.c.id == batch.id))
        async with self.database.write() as connection:
            row = (await connection.execute(added.returning(batches))).first()
            if row:
                await insert_chunks(connection, batch.id, chunks)
            else:
                row = (await connection.execute(older)).one()
        return row_to_batch(row)

    async def batch(self, tenant: str | None, batch_id: str) -> Batch | None:
        async with self.database.read() as connection:
            return await read_batch(connection, tenant, batch_id)

    async def batches(self, tenant: str, page: Page) -> Listed[Batch]:
        async with self.database.read() as connection:
            rows, more = await rows_of_page(connection, batches, tenant, page)
        return Listed(tuple(map(row_to_batch, rows)), more)

    async def open_batches(self, tenant: str) -> int:
        query = sa.select(sa.func.count()).where(batches.c.open, batches.c.tenant == tenant)
        async with self.database.read() as connection:
            return await connection.scalar(query) or 0

    async def queued_lines(self, tenant: str) -> int:
        left = sa.func.sum(batches.c.total - batches.c.completed - batches.c.failed)
        query = sa.select(left).where(batches.c.open, batches.c.tenant == tenant)
        async with self.database.read() as connection:
            return int(await connection.scalar(query) or 0)

    async def remove_batches(self, ended_before_s: float, limit: int) -> int:
        old = sa.select(batches.c.id).where(~batches.c.open, ended_before_s > ENDED_S).limit(limit)
        async with self.database.write() as connection:
            return (await connection.execute(sa.delete(batches).where(batches.c.id.in_(old)))).rowcount

    async def claim_validating(self, worker: str, now_s: float, lease_s: float) -> BatchClaim | None:
        free = (batches.c.status == "validating") & batches.c.ending.is_(None)
        async with self.database.write() as connection:
            return await lease_batch(connection, free, worker, now_s, lease_s)

    async def release_batch(self, claim: BatchClaim, not_before_s: float = 0.0) -> None:
        change = sa.update(batches).where(held(claim)).values(worker=None, lease_until_s=not_before_s)
        async with self.database.write() as connection:
            await connection.execute(change)


def held(claim: BatchClaim) -> sa.ColumnElement[bool]:
    """The batch is still the claimer's. A phase that ended has another epoch too."""
    mine = (batches.c.id == claim.batch.id) & (batches.c.epoch == claim.epoch)
    return mine & batches.c.worker.is_not(None) & batches.c.open


async def read_batch(connection: AsyncConnection, tenant: str | None, batch_id: str) -> Batch | None:
    if tenant is None:
        row = (await connection.execute(READ, {"wanted": batch_id})).first()
    else:
        row = (await connection.execute(READ_OF, {"wanted": batch_id, "of_tenant": tenant})).first()
    return row_to_batch(row) if row else None


async def change_batch(
    connection: AsyncConnection, condition: sa.ColumnElement[bool], values: dict[str, Any]
) -> Batch | None:
    """Compare and set of one row; None when ``condition`` does not hold for it."""
    row = (await connection.execute(sa.update(batches).where(condition).values(values).returning(batches))).first()
    return row_to_batch(row) if row else None


async def change_held(connection: AsyncConnection, claim: BatchClaim, values: dict[str, Any]) -> Batch:
    changed = await change_batch(connection, held(claim), values)
    if changed is None:
        raise LeaseLost(f"batch {claim.batch.id}: epoch {claim.epoch} is over")
    return changed


async def lease_batch(
    connection: AsyncConnection, condition: sa.ColumnElement[bool], worker: str, now_s: float, lease_s: float
) -> BatchClaim | None:
    """The one with the earliest deadline; rows that another claimer looks at just now are passed over."""
    free = sa.select(batches).where(batches.c.open, batches.c.lease_until_s <= now_s, condition)
    free = free.order_by(batches.c.deadline_s, batches.c.id).limit(1).with_for_update(skip_locked=True, of=batches)
    row = (await connection.execute(free)).first()
    if row is None:
        return None
    epoch, attempts = row.epoch + 1, row.attempts + (row.worker is not None)
    lease = {"worker": worker, "epoch": epoch, "lease_until_s": now_s + lease_s, "attempts": attempts}
    await connection.execute(sa.update(batches).where(batches.c.id == row.id).values(lease))
    return BatchClaim(row_to_batch(row), epoch, attempts)


async def insert_chunks(connection: AsyncConnection, batch_id: str, added: Sequence[Chunk]) -> None:
    """All of one batch, in the order of their numbers, and the counters of its models."""
    if not added:
        return
    counters = []
    for model, ofmodel in groupby(sorted(added, key=lambda chunk: (chunk.model, chunk.number)), lambda c: c.model):
        first, *others = ofmodel
        lines = first.stop - first.start + sum(chunk.stop - chunk.start for chunk in others)
        counters.append(
            {
                "batch_id": batch_id,
                "model": model,
                "queued_lines": lines,
                "leased_lines": 0,
                "done_lines": 0,
                "next_prefix": first.prefix,
            }
        )
    await connection.execute(sa.insert(chunks), [to_row(chunk) for chunk in added])
    await connection.execute(sa.insert(batch_models), counters)
