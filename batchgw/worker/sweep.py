"""Bytes that belong to nobody: what an API server had stored when it was killed before it could say so."""

from __future__ import annotations

import re

from batchgw.blobs import Blobs
from batchgw.store.base import Files

ORPHAN_S = 86400.0
"""Bytes are stored before their row is, by a request that may take hours: younger ones may still get it."""

_OURS = re.compile(r"t-[0-9a-f]{61}/((?:file-|part_)[0-9a-f]{32})(?:\.[A-Za-z0-9]{1,10})?")
"""A key as the gateway makes it, and the id of whose it is; all others in the same bucket are left alone."""


async def sweep(files: Files, blobs: Blobs, before_s: float) -> int:
    """Deletes blobs without a row that were written before then (unix seconds); how many.

    Only where no other gateway stores under the same URL: its rows are in another database, and its files would go.
    Raises StoreUnavailable, BlobError.
    """
    removed = await blobs.remove_cut(before_s)
    async for keys in blobs.older(before_s):
        ids = {key: found[1] for key in keys if (found := _OURS.fullmatch(key))}
        known = await files.known_ids(set(ids.values())) if ids else set()
        for key, id in ids.items():
            if id not in known:
                await blobs.delete(key)
                removed += 1
    return removed
