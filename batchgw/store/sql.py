"""The store on SQLite (one machine, no server) or PostgreSQL (many replicas), by URL."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator
from typing import Any, cast

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


class Unbroken:
    """A store whose verbs, once begun, run to their end when whoever waits is cancelled.

    Cut off in the middle, a driver leaves its connection in a transaction until the garbage collector comes by, and on
    SQLite all writers wait for that.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._running: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)
        if not inspect.iscoroutinefunction(verb):
            return verb

        async def call(*given: Any, **named: Any) -> Any:
            task = asyncio.create_task(verb(*given, **named))
            self._running.add(task)
            task.add_done_callback(self._ended)
            return await asyncio.shield(task)

        return call

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # told to nobody when nobody waits any more

    async def close(self) -> None:
        """Waits for what runs; each verb is bounded in time."""
        await asyncio.gather(*self._running, return_exceptions=True)


@contextlib.asynccontextmanager
async def open_store(url: str, *, pool_size: int = 10, limit_s: float = 10.0) -> AsyncIterator[Store]:
    """Opens it at the newest schema, and closes it.

    At most ``pool_size`` connections; a transaction that takes longer than ``limit_s`` is rolled back. ValueError when
    the URL is of neither kind, StoreUnavailable when the database cannot be reached.
    """
    database = Database(url, pool_size, limit_s)
    unbroken = Unbroken(SqlStore(database))
    try:
        await migrate(database)
        yield cast("Store", unbroken)
    finally:
        await unbroken.close()
        await database.engine.dispose()
