"""Webhook deliveries and API keys in SQL."""

from __future__ import annotations

import sqlalchemy as sa

from batchgw.records import ApiKey, Delivery
from batchgw.store.database import OnDatabase
from batchgw.store.tables import api_keys, deliveries, to_record, to_row


class SqlDeliveries(OnDatabase):
    async def claim_delivery(self, now_s: float, lease_s: float) -> Delivery | None:
        due = sa.select(deliveries).where(deliveries.c.due_s <= now_s).order_by(deliveries.c.due_s, deliveries.c.id)
        async with self.database.write() as connection:
            row = (await connection.execute(due.limit(1).with_for_update(skip_locked=True))).first()
            if row is None:
                return None
            values = {"due_s": now_s + lease_s, "attempts": row.attempts + 1}
            change = sa.update(deliveries).where(deliveries.c.id == row.id).values(values).returning(deliveries)
            return to_record(Delivery, (await connection.execute(change)).one())

    async def retry_delivery(self, delivery_id: str, due_s: float) -> None:
        async with self.database.write() as connection:
            await connection.execute(sa.update(deliveries).where(deliveries.c.id == delivery_id).values(due_s=due_s))

    async def end_delivery(self, delivery_id: str) -> None:
        async with self.database.write() as connection:
            await connection.execute(sa.delete(deliveries).where(deliveries.c.id == delivery_id))


class SqlApiKeys(OnDatabase):
    async def add_api_key(self, key: ApiKey) -> None:
        async with self.database.write() as connection:
            await connection.execute(self.database.insert(api_keys).values(to_row(key)).on_conflict_do_nothing())

    async def api_key(self, sha256: str) -> ApiKey | None:
        query = sa.select(api_keys).where(api_keys.c.sha256 == sha256, api_keys.c.revoked_s.is_(None))
        async with self.database.read() as connection:
            row = (await connection.execute(query)).first()
        return to_record(ApiKey, row) if row else None

    async def api_keys(self, tenant: str | None = None) -> list[ApiKey]:
        query = sa.select(api_keys).order_by(api_keys.c.created_s, api_keys.c.sha256)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        async with self.database.read() as connection:
            return [to_record(ApiKey, row) for row in await connection.execute(query)]

    async def revoke_api_key(self, sha256: str, now_s: float) -> bool:
        valid = (api_keys.c.sha256 == sha256) & api_keys.c.revoked_s.is_(None)
        async with self.database.write() as connection:
            done = await connection.execute(sa.update(api_keys).where(valid).values(revoked_s=now_s))
        return done.rowcount > 0
