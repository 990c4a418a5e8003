"""Stores for tests of the batch gateway: SQLite in a folder, and databases of one real PostgreSQL per session."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of platformdirs, where there is no XDG_RUNTIME_DIR
        import pgserver

    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: the path of its socket has a limit
    server = pgserver.get_server(folder, cleanup_mode="stop")
    for name in ("fsync", "full_page_writes", "synchronous_commit"):  # processes are killed here, not the machine
        server.psql(f"ALTER SYSTEM SET {name} = off;")
    server.psql("SELECT pg_reload_conf();")
    yield server
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return database_url(request, tmp_path)


def database_url(request: pytest.FixtureRequest, folder: Path) -> str:
    """A new database of the kind that is the fixture's parameter."""
    if request.param == "sqlite":
        return f"sqlite:///{folder}/batch.db"
    server = request.getfixturevalue("postgres")
    name = f"t{uuid.uuid4().hex}"
    server.psql(f"CREATE DATABASE {name};")
    return str(server.get_uri(name))
