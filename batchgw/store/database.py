"""Connections: one pool, transactions bounded in time, and one exception for whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from batchgw.store.base import StoreUnavailable

ACCEPTED = "postgresql://user:password@host/database, or sqlite:///a/file"
PING_AFTER_S = 2.0
"""A connection that lay idle for so long is asked whether it still stands; each time would cost every verb a round."""
LOST = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError, TimeoutError, OSError)
"""What a database raises that is away, too busy or too slow; deadlocks and serialization failures are among them."""


class Database:
    """Each transaction ends within ``limit_s`` or is rolled back."""

    def __init__(self, url: str, pool_size: int, limit_s: float) -> None:
        self.engine = _engine(url, pool_size, limit_s)
        self.limit_s = limit_s
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        insert = sqlite.insert if self.is_sqlite else postgresql.insert
        self.insert = cast("Callable[[sa.Table], postgresql.Insert]", insert)
        """INSERT that knows ON CONFLICT; both dialects have the same verbs."""
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        async with unavailable(), asyncio.timeout(self.limit_s), self.engine.begin() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """SQLite has one writer: here they queue in turn, where its own busy wait would sleep and starve some."""
        turn = self._turn if self.is_sqlite else contextlib.nullcontext()
        async with unavailable(), asyncio.timeout(self.limit_s), turn, self.engine.connect() as connection:
            writing = await connection.execution_options(writes=True)
            async with writing.begin():
                yield writing


@contextlib.asynccontextmanager
async def unavailable() -> AsyncIterator[None]:
    """Turns whatever a database that is away raises into StoreUnavailable."""
    try:
        yield
    except LOST as error:
        raise StoreUnavailable(f"the database did not do it: {str(error) or type(error).__name__}") from error
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise StoreUnavailable(f"the connection to the database was lost: {error}") from error
        raise


def _engine(url: str, pool_size: int, limit_s: float) -> AsyncEngine:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ValueError(f"not a database URL; accepted: {ACCEPTED}") from None
    common: dict[str, Any] = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": limit_s}
    match parsed.drivername:
        case "postgresql" | "postgres" | "postgresql+psycopg":
            arguments = _postgres_arguments(limit_s)
            parsed = parsed.set(drivername="postgresql+psycopg")
            return _postgres_habits(create_async_engine(parsed, connect_args=arguments, **common))
        case "sqlite" | "sqlite+aiosqlite" if parsed.database and parsed.database != ":memory:":
            arguments = {"timeout": limit_s}
            parsed = parsed.set(drivername="sqlite+aiosqlite")
            return _sqlite_habits(create_async_engine(parsed, connect_args=arguments, **common))
    raise ValueError(f"database URL {parsed.render_as_string()}: accepted: {ACCEPTED}")


def _postgres_arguments(limit_s: float) -> dict[str, Any]:
    limit_ms = int(limit_s * 1000)
    limits = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    return {
        "options": " ".join(f"-c {limit}={limit_ms}" for limit in limits),
        "connect_timeout": max(2, int(limit_s / 2)),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": limit_ms,
        "application_name": "batchgw",
    }


def _postgres_habits(engine: AsyncEngine) -> AsyncEngine:
    """One dead connection is enough for the pool to replace all that are as old."""
    dialect = engine.sync_engine.dialect

    @sa.event.listens_for(engine.sync_engine, "checkin")
    def laid_by(connection: Any, record: Any) -> None:
        record.info["idle_since_s"] = time.monotonic()

    @sa.event.listens_for(engine.sync_engine, "checkout")
    def taken(connection: Any, record: Any, proxy: object) -> None:
        if time.monotonic() - record.info.get("idle_since_s", float("inf")) < PING_AFTER_S:
            return
        try:
            dialect.do_ping(connection)
        except dialect.loaded_dbapi.Error as error:
            raise sa.exc.DisconnectionError(f"the connection is gone: {error}") from error

    return engine


def _sqlite_habits(engine: AsyncEngine) -> AsyncEngine:
    """Write-ahead log, and transactions that we begin ourselves: a writer asks for the lock before it reads."""

    @sa.event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begun(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


class OnDatabase:
    """Base of the parts a store is put together from."""

    def __init__(self, database: Database) -> None:
        self.database = database
