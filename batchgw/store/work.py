"""Chunks, leases and results in SQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchgw.records import Alive, BatchClaim, Chunk, Claim, Lease, Result, Usage, Waiting
from batchgw.store.base import LeaseLost
from batchgw.store.batches import read_batch
from batchgw.store.database import OnDatabase
from batchgw.store.tables import (
    DELAYED,
    LEASED,
    QUEUED,
    UNDONE,
    batch_models,
    batches,
    chunks,
    results,
    row_to_result,
    to_record,
    to_row,
)

RESULTS_A_PAGE = 128
RUNS = (batches.c.status == "in_progress") & batches.c.ending.is_(None)
LINES_LEFT = chunks.c.stop - chunks.c.start - chunks.c.done_lines


class SqlWork(OnDatabase):
    async def waiting(self, now_s: float) -> list[Waiting]:
        counts = batch_models.c.queued_lines, batch_models.c.leased_lines, batch_models.c.done_lines
        query = (
            sa.select(batches.c.id, batches.c.tenant, batches.c.deadline_s, batches.c.created_s, batch_models)
            .join(batch_models, batch_models.c.batch_id == batches.c.id)
            .where(batches.c.open, RUNS, counts[0] + counts[1] > 0)
            .order_by(batches.c.deadline_s, batches.c.id, batch_models.c.model)
        )
        async with self.database.read() as connection:
            rows = list(await connection.execute(query))
            lapsed = await _lines(connection, LEASED & (chunks.c.lease_until_s <= now_s))
            delayed = await _lines(connection, DELAYED & (chunks.c.not_before_s > now_s))
        return [_waiting(row, lapsed, delayed) for row in rows]

    async def claim_chunk(self, batch_id: str, model: str, worker: str, now_s: float, lease_s: float) -> Claim | None:
        due = QUEUED & (chunks.c.not_before_s <= now_s)
        lapsed = LEASED & (chunks.c.lease_until_s <= now_s)
        first = sa.select(chunks).where(chunks.c.batch_id == batch_id, chunks.c.model == model, UNDONE, due | lapsed)
        first = first.order_by(chunks.c.number).limit(1).with_for_update(skip_locked=True)
        async with self.database.write() as connection:
            batch = await read_batch(connection, None, batch_id)
            if batch is None or batch.status != "in_progress" or batch.ending is not None:
                return None
            row = (await connection.execute(first)).first()
            if row is None:
                return None
            chunk = await _lease(connection, to_record(Chunk, row), worker, now_s, lease_s)
            done = await _lines_done(connection, chunk) if chunk.done_lines else frozenset()
        return Claim(chunk, batch, chunk.epoch, done)

    async def heartbeat(self, worker: str, held: Collection[Claim | BatchClaim], now_s: float, lease_s: float) -> Alive:
        leases = {claim.lease for claim in held}
        until_s = now_s + lease_s
        kept = await self._renew_chunks(worker, [lease for lease in leases if lease.number is not None], until_s)
        kept |= await self._renew_batches(worker, [lease for lease in leases if lease.number is None], until_s)
        ids = {lease.batch_id for lease in leases}
        going = sa.select(batches.c.id).where(
            batches.c.id.in_(ids), batches.c.open, batches.c.status != "cancelling", batches.c.ending.is_(None)
        )
        async with self.database.read() as connection:
            ended = ids.difference(await connection.scalars(going)) if ids else set()
        return Alive(frozenset(leases - kept), frozenset(ended))

    async def _renew_chunks(self, worker: str, leases: list[Lease], until_s: float) -> set[Lease]:
        key = chunks.c.batch_id, chunks.c.number, chunks.c.epoch
        mine = sa.tuple_(*key).in_([(lease.batch_id, lease.number, lease.epoch) for lease in leases])
        change = sa.update(chunks).where(mine, LEASED, chunks.c.worker == worker).values(lease_until_s=until_s)
        return await self._renewed(change.returning(*key)) if leases else set()

    async def _renew_batches(self, worker: str, leases: list[Lease], until_s: float) -> set[Lease]:
        key = batches.c.id, batches.c.epoch
        mine = sa.tuple_(*key).in_([(lease.batch_id, lease.epoch) for lease in leases])
        change = sa.update(batches).where(mine, batches.c.worker == worker).values(lease_until_s=until_s)
        returning = batches.c.id, sa.null(), batches.c.epoch
        return await self._renewed(change.returning(*returning)) if leases else set()

    async def _renewed(self, change: Any) -> set[Lease]:
        async with self.database.write() as connection:
            return {Lease(*row) for row in await connection.execute(change)}

    async def add_results(self, claim: Claim, results: Sequence[Result], now_s: float) -> int:
        async with self.database.write() as connection:
            chunk = await _fence(connection, claim)
            new = await self._insert_results(connection, chunk, results)
            if not new:
                return 0
            done_lines = chunk.done_lines + len(new)
            if done_lines > chunk.stop - chunk.start:
                raise ValueError(f"batch {chunk.batch_id}: more results than lines in chunk {chunk.number}")
            await _count_batch(connection, chunk.batch_id, new, now_s)
            await _move_lines(connection, chunk, leased=-len(new), done=len(new))
            state = "done" if done_lines == chunk.stop - chunk.start else "leased"
            await _set_chunk(connection, chunk, done_lines=done_lines, state=state)
        return len(new)

    async def _insert_results(self, connection: AsyncConnection, chunk: Chunk, added: Sequence[Result]) -> list[Result]:
        """Those that were not there yet."""
        by_line = {result.line: result for result in added}
        if not by_line:
            return []
        common = {"batch_id": chunk.batch_id, "chunk": chunk.number}
        rows = [common | _result_row(result) for result in by_line.values()]
        insert = self.database.insert(results).on_conflict_do_nothing().returning(results.c.line)
        return [by_line[line] for line in await connection.scalars(insert, rows)]

    async def release_chunk(self, claim: Claim, not_before_s: float = 0.0) -> None:
        runs = sa.exists().where(batches.c.id == claim.chunk.batch_id, RUNS)
        state = sa.case((runs, "queued"), else_="done")
        async with self.database.write() as connection:
            try:
                chunk = await _fence(connection, claim)
            except LeaseLost:
                return
            await _set_chunk(connection, chunk, state=state, worker=None, lease_until_s=0.0, not_before_s=not_before_s)
            left = chunk.stop - chunk.start - chunk.done_lines
            await _move_lines(connection, chunk, queued=left, leased=-left)

    async def results(self, batch_id: str) -> AsyncIterator[Result]:
        line = -1
        while True:
            query = sa.select(results).where(results.c.batch_id == batch_id, results.c.line > line)
            async with self.database.read() as connection:
                rows = list(await connection.execute(query.order_by(results.c.line).limit(RESULTS_A_PAGE)))
            for row in rows:
                yield row_to_result(row)
            if len(rows) < RESULTS_A_PAGE:
                return
            line = rows[-1].line


def _waiting(row: sa.Row[Any], lapsed: dict[tuple[str, str], int], delayed: dict[tuple[str, str], int]) -> Waiting:
    gone = lapsed.get((row.batch_id, row.model), 0)
    later = delayed.get((row.batch_id, row.model), 0)
    columns = {name: row._mapping[name] for name in Waiting.__struct_fields__}
    columns["queued_lines"] += gone - later
    columns["leased_lines"] -= gone
    return Waiting(**columns)


async def _lines(connection: AsyncConnection, condition: sa.ColumnElement[bool]) -> dict[tuple[str, str], int]:
    """Lines left in such chunks by (batch, model); partial indexes keep them few."""
    query = sa.select(chunks.c.batch_id, chunks.c.model, sa.func.sum(LINES_LEFT)).where(condition)
    rows = await connection.execute(query.group_by(chunks.c.batch_id, chunks.c.model))
    return {(batch_id, model): int(lines) for batch_id, model, lines in rows}


async def _lease(connection: AsyncConnection, found: Chunk, worker: str, now_s: float, lease_s: float) -> Chunk:
    lapsed = found.state == "leased"
    changed: dict[str, Any] = {
        "state": "leased",
        "worker": worker,
        "epoch": found.epoch + 1,
        "lease_until_s": now_s + lease_s,
        "attempts": found.attempts + lapsed,
        "not_before_s": 0.0,
    }
    await _set_chunk(connection, found, **changed)
    left = 0 if lapsed else found.stop - found.start - found.done_lines
    await _move_lines(connection, found, queued=-left, leased=left, started_s=now_s)
    return Chunk(**to_row(found) | changed)


async def _lines_done(connection: AsyncConnection, chunk: Chunk) -> frozenset[int]:
    query = sa.select(results.c.line).where(results.c.batch_id == chunk.batch_id, results.c.chunk == chunk.number)
    return frozenset(await connection.scalars(query))


async def _fence(connection: AsyncConnection, claim: Claim) -> Chunk:
    """Locks the chunk of a lease that still stands."""
    lease = claim.lease
    mine = (chunks.c.batch_id == lease.batch_id) & (chunks.c.number == lease.number) & (chunks.c.epoch == lease.epoch)
    row = (await connection.execute(sa.select(chunks).where(mine, LEASED).with_for_update())).first()
    if row is None:
        raise LeaseLost(f"batch {lease.batch_id}: chunk {lease.number} is no longer held with epoch {lease.epoch}")
    return to_record(Chunk, row)


async def _set_chunk(connection: AsyncConnection, chunk: Chunk, **values: Any) -> None:
    this = (chunks.c.batch_id == chunk.batch_id) & (chunks.c.number == chunk.number)
    await connection.execute(sa.update(chunks).where(this).values(values))


async def _move_lines(
    connection: AsyncConnection,
    chunk: Chunk,
    *,
    queued: int = 0,
    leased: int = 0,
    done: int = 0,
    started_s: float | None = None,
) -> None:
    """Moves lines between the counters of the chunk's model."""
    counts, model = batch_models.c, (chunks.c.batch_id == chunk.batch_id) & (chunks.c.model == chunk.model)
    values: dict[str, Any] = {"leased_lines": counts.leased_lines + leased, "done_lines": counts.done_lines + done}
    if queued:
        following = sa.select(chunks.c.prefix).where(model, UNDONE, QUEUED).order_by(chunks.c.number).limit(1)
        values["queued_lines"] = counts.queued_lines + queued
        values["next_prefix"] = sa.func.coalesce(following.scalar_subquery(), counts.next_prefix)
    if started_s is not None:
        values["started_s"] = sa.func.coalesce(counts.started_s, started_s)
    this = (counts.batch_id == chunk.batch_id) & (counts.model == chunk.model)
    await connection.execute(sa.update(batch_models).where(this).values(values))


async def _count_batch(connection: AsyncConnection, batch_id: str, new: Sequence[Result], now_s: float) -> None:
    """Adds new results to the batch; the last line decides its end."""
    completed = sum(result.ok for result in new)
    usage = sum((result.usage for result in new), Usage())
    counts = {"completed": completed, "failed": len(new) - completed, **to_row(usage)}
    values: dict[str, Any] = {name: batches.c[name] + count for name, count in counts.items()}
    last = RUNS & (batches.c.completed + batches.c.failed + len(new) >= batches.c.total)
    for name, end in {"status": "finalizing", "ending": "completed", "finalizing_s": now_s}.items():
        values[name] = sa.case((last, end), else_=batches.c[name])
    await connection.execute(sa.update(batches).where(batches.c.id == batch_id).values(values))


def _result_row(result: Result) -> dict[str, Any]:
    row = to_row(result)
    return row | to_row(row.pop("usage"))
