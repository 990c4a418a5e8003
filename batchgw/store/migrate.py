"""Brings a database to the newest schema; one process at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from batchgw.store.database import Database, unavailable

LOCK = 0x6261746368677721
"""The advisory lock of PostgreSQL that migrating processes take in turn; any number that others do not use."""
LIMIT_S = 600.0


async def migrate(database: Database) -> None:
    """All in one transaction: a process killed on the way leaves the old schema."""
    async with unavailable(), asyncio.timeout(LIMIT_S), database.engine.connect() as connection:
        writing = await connection.execution_options(writes=True)
        async with writing.begin():
            if not database.is_sqlite:
                for limit in ("statement_timeout", "lock_timeout"):
                    await writing.execute(sa.text(f"SET LOCAL {limit} = {int(LIMIT_S * 1000)}"))
                await writing.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            await writing.run_sync(_upgrade)


def _upgrade(connection: sa.Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
