"""A whole batch gateway for tests: API, worker and storage, one for all tests of a module, each a tenant of its own.

A model's name says what the engine does with it: ``hang-...`` is never answered, ``429-...`` is always refused,
``busy-...`` is refused once a line, ``unknown-...`` is served by no gateway, and any other is answered at once.
"""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import pytest_asyncio

from batchgw.api.app import create_app
from batchgw.api.settings import ApiSettings
from batchgw.blobs import Blobs
from batchgw.records import TERMINAL
from batchgw.seal import Seal
from batchgw.store import open_store
from benchmarks.batch_engine import Asked, Engine, Fault, running
from benchmarks.batch_site import Process, Site
from tests.batch_stores import database_url

KEY = base64.b64encode(b"k" * 32).decode()
LIMIT_S = 30.0
LOOK_S = 0.05
"""Rare enough that waiting costs little."""
TENANT = "x-maas-username"

Object = dict[str, Any]


class Gateway:
    """The whole of it, as one tenant sees it, and what a test looks at behind it."""

    def __init__(self, client: httpx2.AsyncClient, site: Site, engine: Engine, process: Process, folder: Path) -> None:
        self.client, self.site, self.engine, self.process, self.folder = client, site, engine, process, folder
        self.tenant = f"t{uuid.uuid4().hex}"

    async def ask(self, method: str, path: str, tenant: str = "", **given: Any) -> httpx2.Response:
        headers = {TENANT: tenant or self.tenant, **given.pop("headers", {})}
        return await self.client.request(method, f"/v1/{path}", headers=headers, **given)

    async def get(self, path: str, **given: Any) -> Object:
        answer = await self.ask("GET", path, **given)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def upload(self, data: bytes, purpose: str = "batch", name: str = "in.jsonl") -> Object:
        answer = await self.ask("POST", "files", data={"purpose": purpose}, files={"file": (name, data)})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def create(self, data: bytes, headers: Mapping[str, str] | None = None, **fields: Any) -> Object:
        """A batch over a new file, or over ``input_file_id``."""
        file_id = fields.pop("input_file_id", None) or (await self.upload(data))["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}
        answer = await self.ask("POST", "batches", json=body, headers=headers or {})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def ended(self, batch: Object, seen: list[Object] | None = None) -> Object:
        """Polled to its end; ``seen`` takes each answer."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                batch = await self.get(f"batches/{batch['id']}")
                if seen is not None:
                    seen.append(batch)
                if batch["status"] in TERMINAL:
                    return batch
                await asyncio.sleep(LOOK_S)

    async def completes(self, batch: Object, lines: int) -> Object:
        """Polled until so many lines are completed."""
        async with asyncio.timeout(LIMIT_S):
            while (batch := await self.get(f"batches/{batch['id']}"))["request_counts"]["completed"] < lines:
                await asyncio.sleep(LOOK_S)
        return batch

    async def cancel(self, batch: Object) -> httpx2.Response:
        return await self.ask("POST", f"batches/{batch['id']}/cancel")

    async def lines(self, file_id: str | None) -> list[Object]:
        if file_id is None:
            return []
        answer = await self.ask("GET", f"files/{file_id}/content")
        return [msgspec.json.decode(line) for line in answer.content.splitlines()]

    def asked(self, model: str) -> list[Asked]:
        return [asked for asked in self.engine.asked if asked.body["model"] == model]


class Trouble:
    def __init__(self) -> None:
        self._refused: set[str] = set()

    def __call__(self, asked: Asked) -> Fault | None:
        match str(asked.body["model"]).partition("-")[0]:
            case "hang":
                return Fault("hang")
            case "429":
                return Fault("status", 429)
            case "busy" if (id := asked.headers["x-request-id"]) not in self._refused:
                self._refused.add(id)
                return Fault("status", 429)
        return None


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["sqlite", "postgresql"])
async def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "blobs").mkdir()
    settings = ApiSettings(pass_through_headers=("X-Team", "Authorization"), header_keys=(KEY,))
    async with (
        running(Engine(trouble=Trouble())) as engine,
        open_store(database_url(request, folder)) as store,
    ):
        site = Site(store, Blobs.open(str(folder / "blobs")), engine.url)
        transport = httpx2.ASGITransport(app=create_app(settings, store, site.blobs), raise_app_exceptions=False)
        async with (
            httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client,
            worker(site) as process,
        ):
            yield Gateway(client, site, engine, process, folder / "blobs")


@asynccontextmanager
async def worker(site: Site, name: str = "worker", **given: Any) -> AsyncIterator[Process]:
    """One with leases that a slow machine keeps."""
    usual = {"lease_s": 15.0, "heartbeat_s": 0.5, "look_s": LOOK_S, "request_timeout_s": LIMIT_S, "max_retries": 2}
    known = {"known": lambda model: not model.startswith("unknown-"), "open_headers": Seal((KEY,)).open}
    async with site.worker(name, **{**usual, **known, **given}) as process:
        yield process


@pytest.fixture
def gateway(whole: Gateway) -> Gateway:
    return Gateway(whole.client, whole.site, whole.engine, whole.process, whole.folder)


def model(kind: str) -> str:
    """A name of its own: models are independent of each other."""
    return f"{kind}-{uuid.uuid4().hex[:8]}"


def codes(lines: list[Object]) -> set[str]:
    return {line["error"]["code"] for line in lines}
