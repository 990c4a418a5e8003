"""The tables, and how records become rows. Columns are named as the fields of ``batchgw.records``.

``batches.open`` is "not terminal": nearly every question is about the few batches that are, and one partial index
answers them all. ``batch_models`` counts lines per (batch, model), so that nobody has to add up chunks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa

from batchgw.records import Batch, LineError, Result, Scan, Usage

Record = TypeVar("Record", bound=msgspec.Struct)
USAGE = Usage.__struct_fields__

metadata = sa.MetaData()


class Json(sa.types.TypeDecorator[Any]):
    """A value of ``kind`` as JSON text."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else msgspec.json.decode(value, type=self.kind)


class Hash64(sa.types.TypeDecorator[int]):
    """An unsigned 64-bit number in a signed column (two's complement); its order is not kept."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else value - (1 << 64) if value >> 63 else value

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else value & ((1 << 64) - 1)


def _text(name: str, *, null: bool = False, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=null, primary_key=key)


def _whole(name: str, *, null: bool = False, key: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=null, primary_key=key, autoincrement=False)


def _time(name: str, *, null: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Double, nullable=null)


def _partial(name: str, *columns: str, where: str) -> sa.Index:
    return sa.Index(name, *columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


files = sa.Table(
    "files",
    metadata,
    _text("id", key=True),
    _text("tenant"),
    _text("purpose"),
    _text("filename"),
    _whole("bytes"),
    _time("created_s"),
    _text("blob"),
    _time("expires_s", null=True),
    _text("status"),
    _text("status_details", null=True),
    sa.Column("scan", Json(Scan)),
    _text("plan_blob", null=True),
    sa.Index("ix_files_tenant", "tenant", "created_s", "id"),
    _partial("ix_files_expires", "expires_s", where="expires_s IS NOT NULL"),
)

uploads = sa.Table(
    "uploads",
    metadata,
    _text("id", key=True),
    _text("tenant"),
    _text("purpose"),
    _text("filename"),
    _whole("bytes"),
    _text("mime_type"),
    _time("created_s"),
    _time("expires_s"),
    _text("status"),
    _text("file_id", null=True),
)

parts = sa.Table(
    "parts",
    metadata,
    _text("id", key=True),
    sa.Column("upload_id", sa.Text, sa.ForeignKey("uploads.id"), nullable=False),
    _time("created_s"),
    _whole("bytes"),
    _text("blob"),
    sa.Index("ix_parts_upload", "upload_id", "created_s"),
)

batches = sa.Table(
    "batches",
    metadata,
    _text("id", key=True),
    _text("tenant"),
    _text("endpoint"),
    _text("input_file_id"),
    _text("completion_window"),
    _time("created_s"),
    _time("deadline_s"),
    _text("status"),
    _text("ending", null=True),
    sa.Column("metadata", Json(dict[str, str])),
    _whole("total"),
    _whole("completed"),
    _whole("failed"),
    *map(_whole, USAGE),
    _text("model", null=True),
    sa.Column("errors", Json(tuple[LineError, ...]), nullable=False),
    _text("output_file_id", null=True),
    _text("error_file_id", null=True),
    _whole("output_expires_after_s", null=True),
    _time("in_progress_s", null=True),
    _time("finalizing_s", null=True),
    _time("completed_s", null=True),
    _time("failed_s", null=True),
    _time("expired_s", null=True),
    _time("cancelling_s", null=True),
    _time("cancelled_s", null=True),
    sa.Column("headers", sa.LargeBinary),
    _text("trace", null=True),
    _text("idempotency_key", null=True),
    sa.Column("open", sa.Boolean, nullable=False, server_default=sa.true()),
    _text("worker", null=True),
    sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("lease_until_s", sa.Double, nullable=False, server_default="0"),
    sa.Column("attempts", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("ix_batches_tenant", "tenant", "created_s", "id"),
    sa.Index(
        "ix_batches_idempotency",
        "tenant",
        "idempotency_key",
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
        sqlite_where=sa.text("idempotency_key IS NOT NULL"),
    ),
    sa.Index("ix_batches_open", "deadline_s", postgresql_where=sa.text("open"), sqlite_where=sa.text("open = 1")),
)

chunks = sa.Table(
    "chunks",
    metadata,
    _text("batch_id", key=True),
    _whole("number", key=True),
    _text("model"),
    _whole("start"),
    _whole("stop"),
    sa.Column("prefix", Hash64, nullable=False),
    _text("state"),
    _text("worker", null=True),
    _whole("epoch"),
    _time("lease_until_s"),
    _whole("attempts"),
    _time("not_before_s"),
    _whole("done_lines"),
    _partial("ix_chunks_open", "batch_id", "model", "number", where="state <> 'done'"),
    _partial("ix_chunks_leased", "batch_id", where="state = 'leased'"),
    _partial("ix_chunks_delayed", "batch_id", where="state = 'queued' AND not_before_s > 0"),
)

batch_models = sa.Table(
    "batch_models",
    metadata,
    _text("batch_id", key=True),
    _text("model", key=True),
    _whole("queued_lines"),
    _whole("leased_lines"),
    _whole("done_lines"),
    _time("started_s", null=True),
    sa.Column("next_prefix", Hash64, nullable=False),
)

results = sa.Table(
    "results",
    metadata,
    _text("batch_id", key=True),
    _whole("line", key=True),
    _whole("chunk"),
    sa.Column("ok", sa.Boolean, nullable=False),
    sa.Column("output", sa.LargeBinary, nullable=False),
    *map(_whole, USAGE),
    sa.Index("ix_results_chunk", "batch_id", "chunk"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    _text("id", key=True),
    _text("webhook"),
    _text("batch_id"),
    _text("tenant"),
    _text("event"),
    _time("created_s"),
    _time("due_s"),
    _whole("attempts"),
    sa.Index("ix_deliveries_due", "due_s"),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    _text("sha256", key=True),
    _text("tenant"),
    _text("name"),
    _time("created_s"),
    _time("revoked_s", null=True),
)


QUEUED = chunks.c.state == sa.literal_column("'queued'")
LEASED = chunks.c.state == sa.literal_column("'leased'")
UNDONE = chunks.c.state != sa.literal_column("'done'")
DELAYED = QUEUED & (chunks.c.not_before_s > sa.literal_column("0"))
"""Written out, not bound: a partial index is used only where the planner sees its condition in the query."""


def to_row(record: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def to_record(kind: type[Record], row: sa.Row[Any]) -> Record:
    """Columns that ``kind`` has no field for are left out."""
    columns = row._mapping
    return kind(**{name: columns[name] for name in kind.__struct_fields__})


def batch_to_row(batch: Batch) -> dict[str, Any]:
    row = to_row(batch)
    return row | to_row(row.pop("usage"))


def row_to_batch(row: sa.Row[Any]) -> Batch:
    columns = row._mapping
    plain = {name: columns[name] for name in Batch.__struct_fields__ if name != "usage"}
    return Batch(**plain, usage=to_record(Usage, row))


def row_to_result(row: sa.Row[Any]) -> Result:
    return Result(row.line, row.ok, row.output, to_record(Usage, row))
