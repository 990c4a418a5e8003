"""OpenAI's own client, the synchronous one, over HTTP: a process of the API as it runs, and a worker behind it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn

from batchgw.api.app import create_app
from batchgw.api.settings import ApiSettings, Quotas
from batchgw.blobs import Blobs
from batchgw.records import TERMINAL
from batchgw.store import open_store
from benchmarks.batch_engine import Engine, Fault, running
from benchmarks.batch_site import Site, requests
from tests.batch_stores import database_url, postgres

__all__ = ["postgres"]

LINES = requests(2)
LIMIT_S = 30.0
OPEN_BATCHES = 7


class Served:
    """A gateway in a thread of its own: API, worker and engine in one event loop, as ``batchgw serve`` has them."""

    def __init__(self, store_url: str, folder: str) -> None:
        self._store_url, self._folder = store_url, folder
        self._ready, self._thread = threading.Event(), threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._server: uvicorn.Server | None = None
        self.url = ""

    async def _serve(self) -> None:
        settings = ApiSettings(quotas=Quotas(open_batches=OPEN_BATCHES))
        engine_of = Engine(trouble=lambda asked: Fault("hang") if asked.body["model"] == "hang" else None)
        async with running(engine_of) as engine, open_store(self._store_url) as store:
            site = Site(store, Blobs.open(self._folder), engine.url)
            config = uvicorn.Config(create_app(settings, store, site.blobs), port=0, log_level="error", lifespan="off")
            self._server = uvicorn.Server(config)
            listening = config.bind_socket()
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            async with site.worker(look_s=0.1, lease_s=15.0, heartbeat_s=1.0):
                self._ready.set()
                await self._server.serve(sockets=[listening])

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(LIMIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(LIMIT_S)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with Served(database_url(request, folder), str(folder / "blobs")) as made:
        yield made


@pytest.fixture
def client(served: Served, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    """A tenant of its own."""
    tenant = {"X-MaaS-Username": request.node.name}
    with openai.OpenAI(api_key="sk-unused", base_url=served.url, max_retries=0, default_headers=tenant) as made:
        yield made


def uploaded(client: openai.OpenAI, data: bytes = LINES) -> str:
    return client.files.create(file=("in.jsonl", data), purpose="batch").id


def created(client: openai.OpenAI, file_id: str) -> openai.types.Batch:
    return client.batches.create(
        input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"k": "v"}
    )


def ended(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    until_s = time.monotonic() + LIMIT_S
    while (batch := client.batches.retrieve(batch_id)).status not in TERMINAL:
        assert time.monotonic() < until_s, batch
        time.sleep(0.05)
    return batch


def test_a_batch_goes_from_its_file_to_its_output(client: openai.OpenAI) -> None:
    file_id = uploaded(client)
    file = client.files.wait_for_processing(file_id, poll_interval=0.01, max_wait_seconds=1)
    assert (file.status, file.bytes) == ("processed", len(LINES))
    batch = ended(client, created(client, file_id).id)
    assert (batch.status, batch.metadata, batch.model) == ("completed", {"k": "v"}, "m")
    assert batch.usage is not None
    assert batch.usage.output_tokens == 10
    assert batch.output_file_id is not None
    lines = client.files.content(batch.output_file_id).text.splitlines()
    assert [line.count('"status_code":200') for line in lines] == [1, 1]
    assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError, match=file_id):
        client.files.retrieve(file_id)


def test_lists_are_paged_through_to_their_end(client: openai.OpenAI) -> None:
    files = [uploaded(client) for _ in range(5)]
    batches = [created(client, files[0]).id for _ in range(5)]
    assert {file.id for file in client.files.list(limit=2, purpose="batch")} == set(files)
    assert {batch.id for batch in client.batches.list(limit=2)} == set(batches)


def test_a_batch_that_runs_is_cancelled_and_one_that_is_over_is_not(client: openai.OpenAI) -> None:
    batch = created(client, uploaded(client, requests(2, "hang")))
    assert client.batches.cancel(batch.id).status == "cancelling"
    over = ended(client, batch.id)
    assert over.status == "cancelled"
    assert client.batches.cancel(batch.id) == over
    done = ended(client, created(client, uploaded(client)).id)
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.batches.cancel(done.id)


def test_a_file_in_parts_becomes_one(client: openai.OpenAI) -> None:
    upload = client.uploads.upload_file_chunked(
        file=LINES, filename="in.jsonl", bytes=len(LINES), mime_type="application/jsonl", purpose="batch", part_size=100
    )
    assert upload.file is not None
    assert client.files.content(upload.file.id).content == LINES


def test_each_error_has_the_class_the_client_knows(client: openai.OpenAI) -> None:
    file_id = uploaded(client, requests(2, "hang"))
    with pytest.raises(openai.BadRequestError) as wrong:
        client.batches.create(input_file_id=file_id, endpoint="/v1/nonsense", completion_window="24h")  # type: ignore[arg-type]
    assert (wrong.value.param, wrong.value.type) == ("endpoint", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_unknown")
    for _ in range(OPEN_BATCHES):
        created(client, file_id)
    with pytest.raises(openai.ConflictError, match="batch_"):
        client.files.delete(file_id)
    with pytest.raises(openai.RateLimitError, match=f"At most {OPEN_BATCHES}"):
        created(client, file_id)
