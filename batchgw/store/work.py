"""Chunks, leases and results in SQL.

Statements that run for each chunk are made once: making one costs more time than the database takes to run it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from batchgw.records import Alive, BatchClaim, Chunk, Claim, Lease, Result, Usage, Waiting
from batchgw.store.base import LeaseLost
from batchgw.store.database import OnDatabase
from batchgw.store.tables import (
    DELAYED,
    LEASED,
    QUEUED,
    UNDONE,
    USAGE,
    batch_models,
    batches,
    chunks,
    results,
    row_to_batch,
    row_to_result,
    to_record,
    to_row,
)

RESULTS_A_PAGE = 128
RESULT = ("line", "ok", "output", *USAGE)
RUNS = (batches.c.status == "in_progress") & batches.c.ending.is_(None)
LINES_LEFT = chunks.c.stop - chunks.c.start - chunks.c.done_lines

given = sa.bindparam
THIS = (chunks.c.batch_id == given("of_batch")) & (chunks.c.number == given("of_number"))
OF_MODEL = (chunks.c.batch_id == given("of_batch")) & (chunks.c.model == given("of_model")) & UNDONE
DUE = (QUEUED & (chunks.c.not_before_s <= given("now_s"))) | (LEASED & (chunks.c.lease_until_s <= given("now_s")))
FIRST = (
    sa.select(batches, *(column.label(f"chunk_{column.name}") for column in chunks.c))
    .join(chunks, chunks.c.batch_id == batches.c.id)
    .where(RUNS, OF_MODEL, DUE)
    .order_by(chunks.c.number)
    .limit(1)
    .with_for_update(skip_locked=True, of=chunks)
)
FOLLOWING = sa.select(chunks.c.prefix).where(OF_MODEL, QUEUED).order_by(chunks.c.number).limit(1).scalar_subquery()
FENCED = sa.select(chunks).where(THIS, LEASED, chunks.c.epoch == given("by_epoch")).with_for_update()
LINES_DONE = sa.select(results.c.line).where(
    results.c.batch_id == given("of_batch"), results.c.chunk == given("of_number")
)


class SqlWork(OnDatabase):
    async def waiting(self, now_s: float) -> list[Waiting]:
        counts = batch_models.c.queued_lines, batch_models.c.leased_lines, batch_models.c.done_lines
        query = (
            sa.select(
                *((batch_models if name in batch_models.c else batches).c[name] for name in Waiting.__struct_fields__)
            )
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
        wanted = {"of_batch": batch_id, "of_model": model, "now_s": now_s}
        async with self.database.write() as connection:
            row = (await connection.execute(FIRST, wanted)).first()
            if row is None:
                return None
            found = Chunk(**{name: row._mapping[f"chunk_{name}"] for name in Chunk.__struct_fields__})
            chunk = await _lease(connection, found, worker, now_s, lease_s)
            done = await _lines_done(connection, chunk) if chunk.done_lines else frozenset()
        return Claim(chunk, row_to_batch(row), chunk.epoch, done)

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
        rows = [_result_row(result) for result in by_line.values()]
        if self.database.is_sqlite:
            insert = self.database.insert(results).on_conflict_do_nothing().returning(results.c.line)
            common = {"batch_id": chunk.batch_id, "chunk": chunk.number}
            new = await connection.scalars(insert, [common | row for row in rows])
        else:
            columns = {name: [row[name] for row in rows] for name in RESULT}
            new = await connection.scalars(_insert_columns(), _this(chunk) | columns)
        return [by_line[line] for line in new]

    async def release_chunk(self, claim: Claim, not_before_s: float = 0.0) -> None:
        runs = sa.exists().where(batches.c.id == claim.chunk.batch_id, RUNS)
        freed = {"state": sa.case((runs, "queued"), else_="done"), "worker": None, "lease_until_s": 0.0}
        async with self.database.write() as connection:
            try:
                chunk = await _fence(connection, claim)
            except LeaseLost:
                return
            change = sa.update(chunks).where(THIS).values(**freed, not_before_s=not_before_s)
            await connection.execute(change, _this(chunk))
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


@cache
def _insert_columns() -> sa.Insert:
    """One array a column: written row by row, the driver takes longer over so many parameters than all the rest."""
    given_rows = sa.func.unnest(*(given(name, type_=postgresql.ARRAY(results.c[name].type)) for name in RESULT))
    rows = given_rows.table_valued(*RESULT).render_derived()
    of_chunk = given("of_batch", type_=sa.Text), given("of_number", type_=sa.BigInteger)
    insert = postgresql.insert(results).from_select(["batch_id", "chunk", *RESULT], sa.select(*of_chunk, *rows.c))
    return insert.on_conflict_do_nothing().returning(results.c.line)


def _waiting(row: sa.Row[Any], lapsed: dict[tuple[str, str], int], delayed: dict[tuple[str, str], int]) -> Waiting:
    columns = dict(zip(Waiting.__struct_fields__, row, strict=True))  # of hundreds of rows: names one by one take long
    key = columns["batch_id"], columns["model"]
    gone, later = lapsed.get(key, 0), delayed.get(key, 0)
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
    return frozenset(await connection.scalars(LINES_DONE, _this(chunk)))


async def _fence(connection: AsyncConnection, claim: Claim) -> Chunk:
    """Locks the chunk of a lease that still stands."""
    lease = claim.lease
    row = (await connection.execute(FENCED, _this(claim.chunk) | {"by_epoch": lease.epoch})).first()
    if row is None:
        raise LeaseLost(f"batch {lease.batch_id}: chunk {lease.number} is no longer held with epoch {lease.epoch}")
    return to_record(Chunk, row)


def _this(chunk: Chunk) -> dict[str, Any]:
    return {"of_batch": chunk.batch_id, "of_number": chunk.number}


async def _set_chunk(connection: AsyncConnection, chunk: Chunk, **values: Any) -> None:
    new = {f"new_{name}": value for name, value in values.items()}
    await connection.execute(_change_of(*values), _this(chunk) | new)


@cache
def _change_of(*names: str) -> sa.Update:
    return sa.update(chunks).where(THIS).values({name: given(f"new_{name}") for name in names})


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
    moved: dict[str, Any] = {"of_batch": chunk.batch_id, "of_model": chunk.model, "leased": leased, "done": done}
    moved |= {"queued": queued} if queued else {}
    moved |= {"now_s": started_s} if started_s is not None else {}
    await connection.execute(_move_of(queued != 0, started_s is not None), moved)


@cache
def _move_of(queued: bool, started: bool) -> sa.Update:
    counts = batch_models.c
    values = {"leased_lines": counts.leased_lines + given("leased"), "done_lines": counts.done_lines + given("done")}
    if queued:
        values["queued_lines"] = counts.queued_lines + given("queued")
        values["next_prefix"] = sa.func.coalesce(FOLLOWING, counts.next_prefix)
    if started:
        values["started_s"] = sa.func.coalesce(counts.started_s, given("now_s", type_=sa.Double))
    this = (counts.batch_id == given("of_batch")) & (counts.model == given("of_model"))
    return sa.update(batch_models).where(this).values(values)


async def _count_batch(connection: AsyncConnection, batch_id: str, new: Sequence[Result], now_s: float) -> None:
    """Adds new results to the batch; the last line decides its end: past the deadline, with failed ones, it expired."""
    completed = sum(result.ok for result in new)
    usage = sum((result.usage for result in new), Usage())
    counts = {"completed": completed, "failed": len(new) - completed, **to_row(usage)}
    more = {f"more_{name}": count for name, count in counts.items()}
    await connection.execute(_count(), {"of_batch": batch_id, "lines": len(new), "now_s": now_s, **more})


@cache
def _count() -> sa.Update:
    values: dict[str, Any] = {name: batches.c[name] + given(f"more_{name}") for name in ("completed", "failed", *USAGE)}
    last = RUNS & (batches.c.completed + batches.c.failed + given("lines") >= batches.c.total)
    late = (batches.c.deadline_s <= given("now_s")) & (batches.c.failed + given("more_failed") > 0)
    in_time = last & ~late
    ends = [("status", in_time, "finalizing"), ("finalizing_s", in_time, given("now_s", type_=sa.Double))]
    values |= {name: sa.case((when, end), else_=batches.c[name]) for name, when, end in ends}
    values["ending"] = sa.case((in_time, "completed"), (last, "expired"), else_=batches.c.ending)
    return sa.update(batches).where(batches.c.id == given("of_batch")).values(values)


def _result_row(result: Result) -> dict[str, Any]:
    row = to_row(result)
    return row | to_row(row.pop("usage"))
