"""Files and uploads in SQL."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchgw.records import File, Part, Upload
from batchgw.store.base import FileInUse, Listed, Page
from batchgw.store.database import OnDatabase
from batchgw.store.pages import rows_of_page
from batchgw.store.tables import batches, files, parts, to_record, to_row, uploads


class SqlFiles(OnDatabase):
    async def add_file(self, file: File) -> None:
        async with self.database.write() as connection:
            await self.insert_file(connection, file)

    async def insert_file(self, connection: AsyncConnection, file: File) -> None:
        """Once: a file that is there already, by id, stays as it is."""
        await connection.execute(self.database.insert(files).values(to_row(file)).on_conflict_do_nothing())

    async def file(self, tenant: str, file_id: str) -> File | None:
        async with self.database.read() as connection:
            found = await connection.execute(sa.select(files).where(files.c.id == file_id, files.c.tenant == tenant))
            row = found.first()
        return to_record(File, row) if row else None

    async def files(self, tenant: str, purpose: str | None, page: Page) -> Listed[File]:
        conditions = [] if purpose is None else [files.c.purpose == purpose]
        async with self.database.read() as connection:
            rows, more = await rows_of_page(connection, files, tenant, page, *conditions)
        return Listed(tuple(to_record(File, row) for row in rows), more)

    async def remove_file(self, tenant: str, file_id: str) -> File | None:
        reader = sa.select(batches.c.id).where(batches.c.open, batches.c.input_file_id == file_id).limit(1)
        removal = sa.delete(files).where(files.c.id == file_id, files.c.tenant == tenant).returning(files)
        async with self.database.write() as connection:
            row = (await connection.execute(removal)).first()
            batch_id = await connection.scalar(reader) if row else None
            if batch_id is not None:
                raise FileInUse(file_id, batch_id)  # and the removal is rolled back
        return to_record(File, row) if row else None

    async def expired_files(self, now_s: float, limit: int) -> list[File]:
        read = sa.exists().where(batches.c.open, batches.c.input_file_id == files.c.id)
        query = sa.select(files).where(files.c.expires_s <= now_s, ~read).order_by(files.c.expires_s).limit(limit)
        async with self.database.read() as connection:
            return [to_record(File, row) for row in await connection.execute(query)]

    async def known_ids(self, ids: Collection[str]) -> set[str]:
        known = sa.union_all(*(sa.select(table.c.id).where(table.c.id.in_(ids)) for table in (files, parts)))
        async with self.database.read() as connection:
            return set(await connection.scalars(known))

    async def stored_bytes(self, tenant: str) -> int:
        query = sa.select(sa.func.sum(files.c.bytes)).where(files.c.tenant == tenant)
        async with self.database.read() as connection:
            return int(await connection.scalar(query) or 0)

    async def add_upload(self, upload: Upload) -> None:
        async with self.database.write() as connection:
            await connection.execute(self.database.insert(uploads).values(to_row(upload)).on_conflict_do_nothing())

    async def upload(self, tenant: str, upload_id: str) -> Upload | None:
        query = sa.select(uploads).where(uploads.c.id == upload_id, uploads.c.tenant == tenant)
        async with self.database.read() as connection:
            row = (await connection.execute(query)).first()
        return to_record(Upload, row) if row else None

    async def add_part(self, part: Part) -> bool:
        takes = sa.select(uploads.c.id).where(
            uploads.c.id == part.upload_id, uploads.c.status == "pending", uploads.c.expires_s > part.created_s
        )
        async with self.database.write() as connection:
            if await connection.scalar(takes.with_for_update()) is None:
                return False
            await connection.execute(self.database.insert(parts).values(to_row(part)).on_conflict_do_nothing())
        return True

    async def parts(self, upload_id: str) -> list[Part]:
        query = sa.select(parts).where(parts.c.upload_id == upload_id).order_by(parts.c.created_s, parts.c.id)
        async with self.database.read() as connection:
            return [to_record(Part, row) for row in await connection.execute(query)]

    async def end_upload(
        self,
        tenant: str,
        upload_id: str,
        status: Literal["completed", "cancelled", "expired"],
        file: File | None = None,
    ) -> Upload | None:
        pending = (uploads.c.id == upload_id) & (uploads.c.tenant == tenant) & (uploads.c.status == "pending")
        change = sa.update(uploads).where(pending).values(status=status, file_id=file.id if file else None)
        async with self.database.write() as connection:
            row = (await connection.execute(change.returning(uploads))).first()
            if row and file:
                await self.insert_file(connection, file)
        return to_record(Upload, row) if row else None

    async def stale_uploads(self, now_s: float, limit: int) -> list[Upload]:
        has_parts = sa.exists().where(parts.c.upload_id == uploads.c.id)
        stale = (uploads.c.expires_s <= now_s) | ((uploads.c.status != "pending") & has_parts)
        query = sa.select(uploads).where(stale).order_by(uploads.c.expires_s).limit(limit)
        async with self.database.read() as connection:
            return [to_record(Upload, row) for row in await connection.execute(query)]

    async def remove_parts(self, upload_id: str) -> None:
        over = (uploads.c.id == upload_id) & (uploads.c.status != "pending")
        async with self.database.write() as connection:
            await connection.execute(sa.delete(parts).where(parts.c.upload_id == upload_id))
            await connection.execute(sa.delete(uploads).where(over))
