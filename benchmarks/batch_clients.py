"""API servers that are killed, and clients that ask again: what a careful user of the batch API does."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec

from batchgw.records import File
from batchgw.store.base import Page
from benchmarks.batch_processes import Child, serve_api
from benchmarks.batch_site import CHAT, Site, requests

SERVERS = 2
AGAIN_S = 0.05
TRY_S = 10.0
LIMIT_S = 120.0
PIECE_BYTES = 16 << 10
PIECE_S = 0.003
"""Uploads take their time, so that a kill meets them."""
PAUSE_S = 0.03
LISTED = 1000
TENANT = "x-maas-username"

Object = dict[str, Any]


class Servers:
    """API processes over one storage; each comes back on its port."""

    def __init__(self, store_url: str, folder: Path) -> None:
        self._where = (store_url, str(folder))
        self._children: list[Child] = []
        self._ports: list[int] = []

    async def start(self) -> None:
        for _ in range(SERVERS):
            child = Child(serve_api, *self._where, 0)
            self._ports.append(await child.start())
            self._children.append(child)

    def url(self, rng: Random) -> str:
        """Of any: one that is being killed refuses."""
        return f"http://127.0.0.1:{rng.choice(self._ports)}"

    async def kill(self, rng: Random) -> None:
        """One of them, which starts again at once."""
        which = rng.randrange(SERVERS)
        await self._children[which].kill()
        self._children[which] = Child(serve_api, *self._where, self._ports[which])
        await self._children[which].start()

    async def stop(self) -> None:
        for child in self._children:
            await child.kill()


class Client:
    """Whatever breaks off or is 5xx is asked again; batches are created with a key, so that each is made once.

    A file's name is the hash of its bytes. ``broken`` says which answers were not as they must be.
    """

    def __init__(self, servers: Servers, session: aiohttp.ClientSession, rng: Random) -> None:
        self._servers, self._session, self._rng = servers, session, rng
        self.answers: Counter[str] = Counter()
        self.keys: dict[str, str] = {}
        """Idempotency key to the id of its batch."""
        self.broken: list[str] = []

    async def ask(self, method: str, path: str, tenant: str, data: bytes | None = None, **given: Any) -> Object:
        """Until it is answered; 404 and 400 are answers too. Raises TimeoutError."""
        headers = {TENANT: tenant, **given.pop("headers", {})}
        async with asyncio.timeout(LIMIT_S):
            while True:
                if data is not None:
                    given["data"] = _form(data)
                try:
                    url = f"{self._servers.url(self._rng)}/v1/{path}"
                    async with (
                        asyncio.timeout(TRY_S),
                        self._session.request(method, url, headers=headers, **given) as got,
                    ):
                        if got.status < 500:
                            self.answers["answered"] += 1
                            return {**msgspec.json.decode(await got.read()), "http": got.status}
                    self.answers["5xx"] += 1
                except (aiohttp.ClientError, OSError, TimeoutError):
                    self.answers["broken_off"] += 1
                await asyncio.sleep(AGAIN_S)

    async def upload(self, data: bytes, tenant: str) -> str:
        said = await self.ask("POST", "files", tenant, data)
        if said.get("status") != "processed" or said.get("bytes") != len(data):
            self.broken.append(f"an upload was answered {said}")
        return str(said.get("id"))

    async def submit(self, data: bytes, window_s: float, tenant: str, key: str) -> str:
        """The id of the one batch of this key."""
        file_id = await self.upload(data, tenant)
        asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": f"{window_s:g}s"}
        for _ in range(2):  # the second time the answer is known, and must be the same
            said = await self.ask("POST", "batches", tenant, json=asked, headers={"idempotency-key": key})
            if self.keys.setdefault(key, str(said.get("id"))) != said.get("id"):
                self.broken.append(f"key {key} gave {self.keys[key]} and {said}")
        return self.keys[key]

    async def cancel(self, batch_id: str, tenant: str) -> None:
        """400 is for one that is over."""
        said = await self.ask("POST", f"batches/{batch_id}/cancel", tenant)
        if said["http"] not in (200, 400):
            self.broken.append(f"cancelling {batch_id} was answered {said}")

    async def idle_about(self, tenant: str) -> None:
        """Uploads, lists, reads and deletes until cancelled: something of each is under way at any time."""
        while True:
            data = requests(self._rng.randint(200, 600))
            file_id = await self.upload(data, tenant)
            listed = await self.ask("GET", "files?limit=5", tenant)
            if file_id not in [file["id"] for file in listed["data"]]:
                self.broken.append(f"file {file_id} is not in the list")
            await self.ask("GET", "batches?limit=20", tenant)
            if self._rng.random() < 0.5:
                await self.ask("DELETE", f"files/{file_id}", tenant)
            await asyncio.sleep(PAUSE_S)


def _form(data: bytes) -> aiohttp.FormData:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]
            await asyncio.sleep(PIECE_S)

    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", pieces(), filename=_name(data), content_type="application/jsonl")
    return form


def _name(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.jsonl"


@asynccontextmanager
async def clients(store_url: str, folder: Path, rng: Random) -> AsyncIterator[tuple[Servers, Client]]:
    """``folder``: of the blobs."""
    servers = Servers(store_url, folder)
    await servers.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield servers, Client(servers, session, rng)
    finally:
        await servers.stop()


async def half_written(site: Site, tenants: list[str]) -> list[str]:
    """Files of the API whose bytes are not those that were sent, or whose plan is missing."""
    return [
        f"file {file.id} is not what was sent"
        for file in await _files(site, tenants)
        if not await _is_whole(site, file)
    ]


async def made_twice(site: Site, tenants: list[str], keys: dict[str, str]) -> list[str]:
    """Idempotency keys that have not the one batch that was told."""
    found: dict[str, list[str]] = {}
    for tenant in tenants:
        for batch in (await site.store.batches(tenant, Page(limit=LISTED))).items:
            found.setdefault(batch.idempotency_key or "", []).append(batch.id)
    return [f"key {key}: {found.get(key)}, told was {id}" for key, id in keys.items() if found.get(key) != [id]]


async def orphans(site: Site, tenants: list[str], folder: Path) -> list[Path]:
    """Files in the blobs' folder that belong to nobody."""
    files = await _files(site, tenants, purpose=None)
    owned = {key for file in files for key in (file.blob, file.plan_blob) if key}
    return [path for path in stored(folder) if str(path.relative_to(folder)) not in owned]


def stored(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def _files(site: Site, tenants: list[str], purpose: str | None = "batch") -> list[File]:
    return [file for tenant in tenants for file in (await site.store.files(tenant, purpose, Page(limit=LISTED))).items]


async def _is_whole(site: Site, file: File) -> bool:
    data = b"".join([piece async for piece in site.blobs.stream(file.blob)])
    planned = file.plan_blob is not None and await site.blobs.size(file.plan_blob)
    return file.filename == _name(data) and bool(planned)
