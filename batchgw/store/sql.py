"""The store on SQLite (one machine, no server) or PostgreSQL (many replicas), by URL."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import sqlalchemy as sa

from batchgw.store.base import Store
from batchgw.store.batches import SqlBatches
from batchgw.store.database import Database
from batchgw.store.life import SqlLife
from batchgw.store.migrate import migrate
from batchgw.store.notices import SqlApiKeys, SqlDeliveries
from batchgw.store.work import SqlWork


class SqlStore(SqlLife, SqlBatches, SqlWork, SqlDeliveries, SqlApiKeys):
    async def ping(self) -> None:
        async with self.database.read() as connection:
            await connection.execute(sa.select(sa.literal(1)))


@contextlib.asynccontextmanager
async def open_store(url: str, *, pool_size: int = 10, limit_s: float = 10.0) -> AsyncIterator[Store]:
    """Opens it at the newest schema, and closes it.

    At most ``pool_size`` connections; a transaction that takes longer than ``limit_s`` is rolled back. ValueError when
    the URL is of neither kind, StoreUnavailable when the database cannot be reached.
    """
    database = Database(url, pool_size, limit_s)
    try:
        await migrate(database)
        yield SqlStore(database)
    finally:
        await database.engine.dispose()
