"""Input files as workers read them: the plan's rows, and the lines they point at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from batchgw.blobs import BlobMissing, Blobs
from batchgw.client.requests import Call
from batchgw.lines import PLAN, Plan, read_plan
from batchgw.records import Batch, Claim, File
from batchgw.store.base import Files

CACHED_FILES = 256

OpenHeaders = Callable[[bytes], Mapping[str, str]]
"""Decrypts ``Batch.headers``. Raises ValueError when it cannot."""


def no_headers(sealed: bytes) -> Mapping[str, str]:
    return {}


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw


class _Id(msgspec.Struct):
    custom_id: str


_line = msgspec.json.Decoder(_Line)
_id = msgspec.json.Decoder(_Id)


class Inputs:
    """Reads by ranges; holds no file's bytes. Raises BlobError, StoreUnavailable."""

    def __init__(self, files: Files, blobs: Blobs, open_headers: OpenHeaders = no_headers) -> None:
        self._files, self._blobs, self._open_headers = files, blobs, open_headers
        self._cache: OrderedDict[str, File] = OrderedDict()

    async def file(self, batch: Batch) -> File:
        """The batch's input file; BlobMissing when it is gone."""
        found = self._cache.get(batch.input_file_id)
        if found is None:
            found = await self._files.file(batch.tenant, batch.input_file_id)
            if found is None:
                raise BlobMissing(f"input file {batch.input_file_id} is gone")
            self._cache[found.id] = found
            if len(self._cache) > CACHED_FILES:
                self._cache.popitem(last=False)
        return found

    async def plan(self, batch: Batch, start: int = 0, stop: int | None = None) -> Plan:
        """Rows ``start`` to ``stop`` of the plan; empty for a file without one."""
        file = await self.file(batch)
        if file.plan_blob is None or file.scan is None:
            return np.empty(0, PLAN)
        stop = file.scan.lines if stop is None else stop
        if stop <= start:
            return np.empty(0, PLAN)
        return read_plan(await self._blobs.get_range(file.plan_blob, start * PLAN.itemsize, stop * PLAN.itemsize))

    async def calls(self, claim: Claim) -> list[Call]:
        """The chunk's lines that have no result yet, in the plan's order."""
        batch, chunk = claim.batch, claim.chunk
        rows = [row for row in await self.plan(batch, chunk.start, chunk.stop) if int(row["line"]) not in claim.done]
        headers = self._open_headers(batch.headers) if batch.headers else {}
        calls = []
        for row, data in zip(rows, await self._read(batch, rows), strict=True):
            line = _line.decode(data)
            calls.append(
                Call(
                    batch_id=batch.id,
                    line=int(row["line"]),
                    custom_id=line.custom_id,
                    url=line.url,
                    model=chunk.model,
                    body=bytes(line.body),
                    tenant=batch.tenant,
                    deadline_s=batch.deadline_s,
                    headers=headers,
                    trace=batch.trace,
                    prefix=int(row["prefix"]),
                    prompt_bytes=int(row["prompt_bytes"]),
                )
            )
        return calls

    async def custom_ids(self, batch: Batch, rows: Sequence[np.void] | Plan) -> list[str]:
        return [_id.decode(data).custom_id for data in await self._read(batch, rows)]

    async def _read(self, batch: Batch, rows: Sequence[np.void] | Plan) -> list[bytes]:
        file = await self.file(batch)
        ranges = [(int(row["offset"]), int(row["offset"]) + int(row["length"])) for row in rows]
        return await self._blobs.get_ranges(file.blob, ranges) if ranges else []
