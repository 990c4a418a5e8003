"""Commands that do one thing over the storage and end."""

from __future__ import annotations

import re
import secrets
import time

from prometheus_client import CollectorRegistry

from batchgw.api.auth import MAX_TENANT_CHARS, hashed
from batchgw.app.parts import Batching, storage
from batchgw.config import Settings
from batchgw.errors import ConfigError
from batchgw.records import ApiKey
from batchgw.worker.sweep import ORPHAN_S, sweep
from batchgw.worker.upkeep import AT_ONCE

MAX_ROUNDS = 10_000
KEY_BYTES = 32
KINDS = {"file": "files removed", "upload": "uploads removed", "batch": "batches removed"}
_TENANT = re.compile(rf"[\x20-\x7e]{{1,{MAX_TENANT_CHARS}}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


async def collect(settings: Settings, orphans: bool = False) -> dict[str, int]:
    """One pass over what is past its time: how many batches were ended, and how much of each kind was removed.

    ``orphans``: stored bytes too that no row speaks of, which is only right where no other gateway stores there.
    """
    registry, expired = CollectorRegistry(), 0
    async with storage(settings) as (store, blobs):
        upkeep = Batching(settings, store, blobs, registry).upkeep
        for _ in range(MAX_ROUNDS):
            ended = len(await store.expire_batches(time.time(), AT_ONCE))
            expired += ended
            if not await upkeep.collect() and not ended:
                break
        swept = {"orphans removed": await sweep(store, blobs, time.time() - ORPHAN_S)} if orphans else {}
    removed = {
        text: int(registry.get_sample_value("batchgw_collected_total", {"kind": kind}) or 0)
        for kind, text in KINDS.items()
    }
    return {"batches expired": expired, **removed, **swept}


async def add_key(settings: Settings, tenant: str, name: str) -> str:
    """A new API key; only its hash is stored, so this is the one time that it is seen."""
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(f"must be 1 to {MAX_TENANT_CHARS} printable ASCII characters, not {tenant!r}", "TENANT")
    key = f"sk-{secrets.token_urlsafe(KEY_BYTES)}"
    async with storage(settings) as (store, _):
        await store.add_api_key(ApiKey(sha256=hashed(key), tenant=tenant, name=name, created_s=time.time()))
    return key


async def revoke_key(settings: Settings, key: str) -> bool:
    """``key``: itself or its hash; False when it is unknown or was revoked before."""
    async with storage(settings) as (store, _):
        return await store.revoke_api_key(key if _SHA256.fullmatch(key) else hashed(key), time.time())
