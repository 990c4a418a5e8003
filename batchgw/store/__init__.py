"""The durable state of the gateway: SQLite or PostgreSQL, behind one protocol."""

from batchgw.store.base import Store
from batchgw.store.sql import open_store

__all__ = ["Store", "open_store"]
