"""The API in process over SQLite and a folder, for tests of the batch gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import msgspec
from fastapi import FastAPI

from batchgw.api.app import create_app
from batchgw.api.settings import ApiSettings
from batchgw.blobs import Blobs
from batchgw.store import Store, open_store

Answer = Mapping[str, Any]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Api:
    """One app, and what a test looks at behind it."""

    def __init__(self, client: httpx2.AsyncClient, store: Store, folder: Path, clock: Clock) -> None:
        self.client, self.store, self.folder, self.clock = client, store, folder, clock

    async def upload(self, data: bytes, purpose: str = "batch", name: str = "in.jsonl", **headers: str) -> Answer:
        form = {"purpose": purpose}
        answer = await self.client.post("/v1/files", data=form, files={"file": (name, data)}, headers=headers)
        assert answer.status_code == 200, answer.text
        self.clock.now_s += 1
        return dict(answer.json())

    async def batch(self, file_id: str, headers: Mapping[str, str] | None = None, **fields: Any) -> httpx2.Response:
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}
        self.clock.now_s += 1
        return await self.client.post("/v1/batches", json=body, headers=headers)

    @contextlib.asynccontextmanager
    async def over(self, app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
        """A client of another app."""
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client

    def blobs(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


@contextlib.asynccontextmanager
async def api_of(folder: Path, settings: ApiSettings | None = None, url: str = "") -> AsyncIterator[Api]:
    """``url``: of the store; SQLite in the folder when empty."""
    clock, blobs = Clock(), folder / "blobs"
    blobs.mkdir()
    async with open_store(url or f"sqlite:///{folder}/batch.db") as store:
        app = create_app(settings or ApiSettings(), store, Blobs.open(str(blobs)), clock=clock)
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield Api(client, store, blobs, clock)


def line(custom_id: str = "a", **changes: Any) -> bytes:
    """One line of batch input; ``body`` fields by ``body_<name>``, None leaves a field out."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    request: dict[str, Any] = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    for name, value in changes.items():
        holder = body if name.startswith("body_") else request
        holder[name.removeprefix("body_")] = value
    return msgspec.json.encode({name: value for name, value in request.items() if value is not None}) + b"\n"


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)
