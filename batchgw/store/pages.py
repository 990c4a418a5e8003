"""One page of a tenant's objects, by keyset after an id or by offset after a number."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchgw.store.base import Page, UnknownCursor


async def rows_of_page(
    connection: AsyncConnection, table: sa.Table, tenant: str, page: Page, *conditions: sa.ColumnElement[bool]
) -> tuple[list[sa.Row[Any]], bool]:
    """The rows, and whether more follow; raises UnknownCursor."""
    order = (table.c.created_s, table.c.id)
    query = sa.select(table).where(table.c.tenant == tenant, *conditions).limit(page.limit + 1)
    query = query.order_by(*(column.desc() if page.descending else column.asc() for column in order))
    if isinstance(page.after, int):
        query = query.offset(page.after)
    elif page.after is not None:
        anchor = sa.select(table.c.created_s).where(table.c.tenant == tenant, table.c.id == page.after)
        created_s = await connection.scalar(anchor)
        if created_s is None:
            raise UnknownCursor(f"no {table.name} of this tenant has the id {page.after}")
        here, there = sa.tuple_(*order), sa.tuple_(sa.literal(created_s), sa.literal(page.after))
        query = query.where(here < there if page.descending else here > there)
    rows = list(await connection.execute(query))
    return rows[: page.limit], len(rows) > page.limit
